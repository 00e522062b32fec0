"""Whole chats as prompts, and tenants: what the chat template says, and nothing of anybody else's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.workers.test_segment import GEMMA_2, MINIMUM, SPACE, with_template
from transport.errors import ModelError
from workers.sampling import Sampler
from workers.segment import Message, PromptBuilder, SlotValue, tenant_space
from workers.settings import SamplingSettings

CHAT = (
    Message("system", "Be {{brief}}."),
    Message("user", "Plan: {plan}"),
    Message("assistant", "{plan}"),
    Message("user", "  Why? "),
)
SAID = "We count <|im_end|> them, one by one, and then we multiply."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from workers.embedded import import_embedded

    return AutoTokenizer.from_pretrained(str(import_embedded()))


@pytest.fixture(scope="module")
def builder(tokenizer: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer, SPACE, MINIMUM, 8192)


def test_a_chat_is_what_the_chat_template_says(tokenizer: Any, builder: PromptBuilder) -> None:
    template = builder.chat_template(CHAT)
    assert template.slots == ("plan",)
    prompt = builder.build(template, {"plan": SlotValue(text=SAID)})
    messages = [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": f"Plan: {SAID}"},
        {"role": "assistant", "content": SAID},
        {"role": "user", "content": "  Why? "},
    ]
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt.token_ids) == said
    spans = [s for s in prompt.spans if s.key is not None]
    assert len(spans) == 2
    assert spans[0].key == spans[1].key
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt.token_ids.count(end) == len(CHAT), "none of it was written by a user"


def test_a_chat_of_one_message_is_the_same_prompt(builder: PromptBuilder) -> None:
    one = builder.chat_template([Message("system", "Be brief."), Message("user", "Solve {q}.")])
    assert one == builder.template("Be brief.", "Solve {q}.")
    assert builder.chat_template([Message("user", "Solve {q}.")]) == builder.template(None, "Solve {q}.")


def test_without_a_system_role_its_text_opens_the_first_user_message(tokenizer: Any) -> None:
    builder = PromptBuilder(with_template(tokenizer, GEMMA_2), SPACE, MINIMUM, 8192)
    chat = (Message("system", "Be brief."), Message("user", "Solve it"), Message("assistant", "No."))
    text = tokenizer.decode(builder.build(builder.chat_template(chat), {}).token_ids)
    assert "<start>user\nBe brief.\n\nSolve it<end>\n<start>assistant\nNo.<end>" in text
    with pytest.raises(ModelError, match="System role not supported"):
        builder.chat_template((Message("user", "Hi"), Message("system", "Be brief.")))


def test_without_a_chat_template_a_chat_is_refused_and_a_plain_text_is_not(tokenizer: Any) -> None:
    builder = PromptBuilder(with_template(tokenizer, None), SPACE, MINIMUM, 8192)
    with pytest.raises(ModelError, match="no chat template"):
        builder.chat_template(CHAT)
    template = builder.raw_template("Once {a} time <|im_end|>")
    ids = builder.build(template, {"a": SlotValue(text="upon a")}).token_ids
    assert tokenizer.decode(ids) == "Once upon a time <|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


def test_tenants_have_keys_of_their_own(builder: PromptBuilder) -> None:
    template = builder.raw_template("{text} Go on.")
    values = {"text": SlotValue(text=SAID)}
    none, red, blue = (builder.build(template, values, tenant=t) for t in ("", "red", "blue"))
    assert none.token_ids == red.token_ids == blue.token_ids
    keys = [p.spans[0].key for p in (none, red, blue)]
    assert all(keys)
    assert len(set(keys)) == 3
    assert tenant_space(SPACE, "") == SPACE
    assert tenant_space("a", "b\0c") != tenant_space("a\0b", "c")


def test_scores_are_log_probabilities_of_the_model_and_not_of_the_sampler() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0, -torch.inf])
    hot = Sampler(SamplingSettings(temperature=2.0, top_p=0.1, logprobs=2))
    found = hot.scores(logits, 1)
    assert found is not None
    expected = torch.log_softmax(logits, 0)
    assert found[0] == pytest.approx(float(expected[1]))
    assert [i for i, _ in found[1]] == [2, 1]
    assert [p for _, p in found[1]] == pytest.approx([float(expected[2]), float(expected[1])])
    alone = Sampler(SamplingSettings(logprobs=0)).scores(logits, 2)
    assert alone == (pytest.approx(float(expected[2])), ())
    assert Sampler(SamplingSettings()).scores(logits, 2) is None
