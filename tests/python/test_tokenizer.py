"""The tokenizer: Gemma 4's own cases, round trips of any text, and texts cut anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma
from dgemma.tokenizer import BYTE, CONTROL, NORMAL, USER_DEFINED, Tokenizer

# Everything but half surrogates, which are no text, and ▁, which stands for a space.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))

WORDS = ["▁", "h", "e", "l", "o", "he", "ll", "llo", "hello", "▁hello", "\n", "\n\n"]
MERGES = ["h e", "l l", "ll o", "he llo", "▁ hello", "\n \n"]
SPECIAL = {"<bos>": CONTROL, "<|turn>": CONTROL, "<|channel>": CONTROL, '<|"|>': USER_DEFINED}


def small_keys(**changes: Any) -> dict[str, Any]:
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    types = [*SPECIAL.values(), *[BYTE] * 256, *[NORMAL] * len(WORDS)]
    keys = {
        "model": "gemma4",
        "tokens": tokens,
        "token_type": types,
        "merges": MERGES,
        "bos_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items() if value is not None}


SMALL = Tokenizer(small_keys())


@pytest.fixture(scope="module")
def gemma(gemma4: Path) -> Tokenizer:
    with dgemma.File(gemma4 / "vocab.gguf") as file:
        return Tokenizer(file.keys)


@given(ANY_TEXT, st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_the_beginning_of_a_text_is_that_of_the_whole(gemma: Tokenizer, text: str, n: int) -> None:
    for written in (text, text * 50, "hello " * 500):
        assert gemma.encode_start(written, n) == gemma.encode(written, special=False)[:n]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", [1] * (len(SPECIAL) + 256 + len(WORDS))),
        ("token_type", ["1"] * (len(SPECIAL) + 256 + len(WORDS))),
        ("merges", [1, 2]),
        ("merges", ["a"]),
        ("bos_token_id", 1.5),
        ("bos_token_id", "<bos>"),
    ],
)
def test_keys_of_other_types_are_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(dgemma.ModelFileError, match=f"tokenizer.ggml.{name}") as refused:
        Tokenizer(small_keys(**{name: value}))
    assert "\n" not in str(refused.value)


def test_public_cases(gemma: Tokenizer, gemma4: Path) -> None:
    texts = (gemma4 / "vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (gemma4 / "vectors.out").read_text().splitlines()
    assert len(texts) == len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        assert gemma.encode(text) == [int(id) for id in line.split()], repr(text)


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_round_trip_with_the_real_vocabulary(gemma: Tokenizer, text: str) -> None:
    assert gemma.decode(gemma.encode(text), special=True) == text


@given(ANY_TEXT)
@settings(deadline=None)
def test_round_trip(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text), special=True) == text
    assert SMALL.decode(SMALL.encode(text, special=False), special=True) == text


@given(ANY_TEXT)
@settings(deadline=None)
def test_a_decoder_that_is_fed_token_by_token_says_the_same(text: str) -> None:
    ids, decoder = SMALL.encode(text, special=False), SMALL.decoder()
    pieces = [decoder.feed(id) for id in ids] + [decoder.finish()]
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, len(SMALL) - 1)))
def test_any_tokens_decode_alike_at_once_and_one_by_one(ids: list[int]) -> None:
    decoder = SMALL.decoder()
    assert "".join([decoder.feed(id) for id in ids] + [decoder.finish()]) == SMALL.decode(ids)


def test_characters_come_out_whole() -> None:
    decoder, data = SMALL.decoder(), "🦙".encode()
    ids = [SMALL.id(f"<0x{byte:02X}>") for byte in data]
    assert [decoder.feed(id) for id in ids if id is not None] == ["", "", "", "🦙"]


def test_merges_and_spaces() -> None:
    assert SMALL.encode("hello hello") == [SMALL.id("hello"), SMALL.id("▁hello")]
    assert SMALL.encode("\n\n\n") == [SMALL.id("\n\n"), SMALL.id("\n")]


def test_control_tokens_are_recognised_only_when_asked() -> None:
    turn = SMALL.id("<|turn>")
    assert SMALL.encode("<|turn>hello") == [turn, SMALL.id("hello")]
    assert turn not in SMALL.encode("<|turn>hello", special=False)
    assert SMALL.encode('<|"|>', special=False) == [SMALL.id('<|"|>')]


def test_control_tokens_have_no_text_but_marks_do() -> None:
    ids = SMALL.encode('<|turn>hello<|channel><|"|>')
    # A file may call <|channel> a control token: its text is still part of the answer.
    assert SMALL.decode(ids) == 'hello<|channel><|"|>'
    assert SMALL.decode(ids, special=True) == '<|turn>hello<|channel><|"|>'


def test_the_begin_token_stands_once() -> None:
    assert SMALL.encode("hello", add_bos=True)[0] == SMALL.bos
    assert SMALL.encode("<bos>hello", add_bos=True).count(0) == 1


def test_half_a_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="position 2"):
        SMALL.encode("ab\ud800")


@pytest.mark.parametrize("id", [-1, len(SMALL)])
def test_unknown_ids_are_refused(id: int) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        SMALL.decode([id])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "'llama'"),
        ({"model": None}, "missing"),
        ({"tokens": None}, "tokens is missing"),
        ({"merges": "h e"}, "merges is a str"),
        ({"merges": ["h"]}, "merges"),
        ({"merges": ["h nowhere"]}, "merges"),
        ({"token_type": [1]}, "token_type has 1"),
        ({"bos_token_id": 10**6}, "bos_token_id"),
    ],
)
def test_metadata_that_describes_no_tokenizer(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(dgemma.ModelFileError, match=message):
        Tokenizer(small_keys(**changes))
