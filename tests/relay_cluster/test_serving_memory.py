"""Messages become templates with slots: nothing is lost, nothing is invented, tenants do not meet."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.serving.memory import ChatText, Memory, Rewritten, plain, segment_id
from workers.segment import SlotValue, _parse

PLAN = "First count the sheep, then multiply by six, and at last divide the flock by two."
IDS = SlotValue(token_ids=tuple(range(30)), kv_tokens=29)
# No part of it comes twice: where a text repeats itself, which copy a match begins in depends on the hashes.
DOCUMENT = "".join(f"Farm {n} lies in valley {'abcdefgh'[n]}. " for n in range(8))


def memory() -> Memory:
    return Memory(max_texts=100, max_bytes=1 << 20, min_input_chars=128, common_chars=1 << 16)


def spelt(prompt: Rewritten, answers: dict[str, str]) -> list[str]:
    """The messages' texts, put together again as a worker would. answers: id -> text."""
    ids = {found.slot: found.id for found in prompt.found}
    texts: list[str] = []
    for message in prompt.messages:
        parts: list[str] = []
        for part in _parse(message.content):
            if part.slot is None:
                parts.append(part.text)
                continue
            value = prompt.values[part.slot]
            parts.append(answers[ids[part.slot]] if value.text is None else value.text)
        texts.append("".join(parts))
    return texts


def test_an_answer_is_found_whole_and_embedded_and_spliced_as_its_ids() -> None:
    kept = memory()
    name = kept.keep_answer(PLAN, IDS)
    assert name == segment_id(PLAN)
    chat = [
        ChatText("system", f"Judge this: {PLAN}"),
        ChatText("user", f'He said: "{PLAN}" Is {{that}} right?'),
        ChatText("assistant", PLAN),
    ]
    prompt = kept.rewrite(chat)
    assert [(f.id, f.kind, f.chars) for f in prompt.found] == [(name, "response", len(PLAN))] * 3
    assert [prompt.values[f.slot] for f in prompt.found] == [IDS] * 3
    assert prompt.messages[2].content == "{" + prompt.found[2].slot + "}"
    assert spelt(prompt, {name: PLAN}) == [m.text for m in chat]
    assert prompt.inputs == (), "what is left is too short to share"


def test_inputs_of_users_and_tools_are_shared_from_the_first_time_on() -> None:
    kept = memory()
    chat = [ChatText("system", DOCUMENT), ChatText("user", DOCUMENT + "1"), ChatText("tool", DOCUMENT + "2")]
    first = kept.rewrite(chat)
    assert first.found == ()
    assert first.inputs == (DOCUMENT + "1", DOCUMENT + "2"), "a system text is in the prefix cache"
    assert [v.text for v in first.values.values()] == list(first.inputs)
    kept.keep_inputs(first)
    second = kept.rewrite([ChatText("user", f"Read:\n{DOCUMENT}2\nWhat does it say?")])
    assert [(f.id, f.kind) for f in second.found] == [(segment_id(DOCUMENT + "2"), "input")]
    assert second.values[second.found[0].slot].text == DOCUMENT + "2"


def test_a_document_inside_other_words_is_found_by_the_third_reader() -> None:
    kept = memory()
    found = []
    for head, tail in (("Plan", "One."), ("Solve", "Two."), ("Judge", "Three.")):
        prompt = kept.rewrite([ChatText("user", f"{head} this:\n{DOCUMENT}\n{tail}")])
        assert spelt(prompt, {}) == [f"{head} this:\n{DOCUMENT}\n{tail}"]
        kept.keep_inputs(prompt)
        found.append([(f.kind, f.id) for f in prompt.found])
    assert found == [[], [], [("input", segment_id(DOCUMENT.strip()))]]


def test_a_match_does_not_reach_over_two_messages() -> None:
    kept = memory()
    kept.keep_answer(PLAN, IDS)
    half = len(PLAN) // 2
    assert kept.rewrite([ChatText("user", PLAN[:half]), ChatText("user", PLAN[half:])]).found == ()


def test_only_named_segments_are_found() -> None:
    kept = memory()
    kept.keep_answer(PLAN, IDS)
    chat = [ChatText("assistant", PLAN)]
    assert kept.rewrite(chat, only={"seg-of-nobody"}).found == ()
    assert len(kept.rewrite(chat, only={segment_id(PLAN)}).found) == 1


def test_an_answer_without_kv_is_not_remembered() -> None:
    kept = memory()
    assert kept.keep_answer(PLAN, SlotValue(token_ids=(1, 2))) is None
    assert kept.keep_answer("short", IDS) is None
    assert len(kept) == 0


def test_an_answer_that_was_an_input_before_is_spliced() -> None:
    kept = memory()
    asked = kept.rewrite([ChatText("user", DOCUMENT)])
    kept.keep_inputs(asked)
    kept.keep_answer(DOCUMENT, IDS)
    kept.keep_inputs(asked)
    (found,) = kept.rewrite([ChatText("user", DOCUMENT)]).found
    assert found.kind == "response"


TEXT = st.text(alphabet=st.sampled_from("ab {}\n\U000f0000\U0010ffff"), max_size=150)


@given(
    kept=st.lists(TEXT, max_size=4),
    chat=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_rewritten_chat_spells_the_same_texts(
    kept: list[str], chat: list[tuple[str, str]], data: st.DataObject
) -> None:
    mind = memory()
    for text in kept:
        mind.keep_answer(text, IDS)
    extra = data.draw(st.lists(st.sampled_from(kept), max_size=2)) if kept else []
    messages = [ChatText(role, text + "".join(f" {e} " for e in extra)) for role, text in chat]
    prompt = mind.rewrite(messages)
    assert spelt(prompt, {segment_id(t): t for t in kept}) == [m.text for m in messages]
    assert spelt(plain(messages), {}) == [m.text for m in messages]
    assert [m.role for m in prompt.messages] == [m.role for m in messages]


def test_a_document_is_found_by_the_second_agent_although_both_say_more() -> None:
    from relay_cluster.serving.memory import ChatText, Memory

    memory = Memory(max_texts=100, max_bytes=1 << 20, min_input_chars=128, common_chars=1 << 20)
    document = "\n\n".join(f"Part {n}: " + "what happened on that day, and why. " * 8 for n in range(3))
    first = memory.rewrite([ChatText("user", f"A report:\n\n{document}\n\nMake a plan in a few steps.")])
    assert first.inputs == (document,)
    assert [v.text for v in first.values.values()] == [document]
    memory.keep_inputs(first)
    second = memory.rewrite([ChatText("user", f"{document}\n\nPlan:\n\nRead it.\n\nFollow the plan.")])
    assert [(f.kind, f.chars) for f in second.found] == [("input", len(document))]


def test_paragraphs_that_are_much_of_a_text_stay_in_it() -> None:
    from relay_cluster.serving.memory import ChatText, Memory

    memory = Memory(max_texts=100, max_bytes=1 << 20, min_input_chars=128, common_chars=1 << 20)
    short = "\n\n".join(f"Line {n} of a talk between two people." for n in range(5))
    (kept,) = memory.rewrite([ChatText("user", short)]).inputs
    assert len(kept) >= 0.75 * len(short)
    assert kept in short
