"""The incremental detokeniser gives out final text only, and all of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from workers.embedded import import_embedded
from workers.tokens import TokenStream


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(import_embedded()))


@pytest.fixture(scope="session")
def sentencepiece_like() -> Any:
    """The decoder of Llama 2: "▁" for blanks, byte fallback, the first blank dropped."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁Hello",
        "▁world",
        "lo",
        ".",
    ]
    raw = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def stream(tokenizer: Any, ids: list[int], **kwargs: bool) -> list[str]:
    tokens = TokenStream(tokenizer, **kwargs)
    pieces = [tokens.push(i) for i in ids]
    pieces.append(tokens.finish())
    assert tokens.text == "".join(pieces)
    return pieces


def whole(tokenizer: Any, ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "text",
    [
        "plain words.",
        "  two  blanks\n\n",
        "naïve café",
        "😀👩‍👩‍👧‍👦🇩🇪",
        "日本語のテキスト",
        "e\u0301 नमस्ते",
        "\ufffd real",
        "",
    ],
)
def test_pieces_join_to_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == text


def test_a_split_character_is_held_back_until_it_is_whole(tokenizer: Any) -> None:
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) > 1
    pieces = stream(tokenizer, ids)
    assert pieces[: len(ids) - 1] == [""] * (len(ids) - 1)
    assert pieces[len(ids) - 1] == "😀"


def test_a_character_cut_off_at_the_end_becomes_a_replacement_character(tokenizer: Any) -> None:
    ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    assert "".join(stream(tokenizer, ids)) == whole(tokenizer, ids)
    assert "".join(stream(tokenizer, ids)).startswith("a")


def test_special_tokens_are_left_out_or_spelt(tokenizer: Any) -> None:
    ids = [*tokenizer.encode("end", add_special_tokens=False), tokenizer.eos_token_id]
    assert "".join(stream(tokenizer, ids)) == "end"
    assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == "end<|im_end|>"


def test_ordinary_words_are_given_out_at_once(tokenizer: Any) -> None:
    ids = tokenizer.encode("one two three", add_special_tokens=False)
    assert all(stream(tokenizer, ids)[: len(ids)])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 49151), max_size=30), st.booleans())
def test_any_ids_join_to_what_decode_says(tokenizer: Any, ids: list[int], skip: bool) -> None:
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == whole(tokenizer, ids, skip)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 263), max_size=20), st.booleans())
def test_sentencepiece_blanks_and_byte_runs_join_to_what_decode_says(
    sentencepiece_like: Any, ids: list[int], skip: bool
) -> None:
    pieces = stream(sentencepiece_like, ids, skip_special_tokens=skip)
    assert "".join(pieces) == whole(sentencepiece_like, ids, skip)


def test_sentencepiece_keeps_the_blank_between_words(sentencepiece_like: Any) -> None:
    hello, world = sentencepiece_like.convert_tokens_to_ids(["▁Hello", "▁world"])
    assert stream(sentencepiece_like, [hello, world]) == ["Hello", " world", ""]
