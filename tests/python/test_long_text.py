"""Long texts: refused before they are encoded where they cannot fit, and encoded in parts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import dgemma
from dgemma import tokenizer as module
from dgemma.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llm(tiny_gguf: Path) -> dgemma.DiffusionGemma:
    return dgemma.DiffusionGemma(tiny_gguf, n_ctx=256)


def texts() -> list[str]:
    """Texts of many kinds, a few parts long each."""
    draw = random.Random(1)
    bits = ["word ", "  ", "\n", "\n\n", "a", "é", "🦙", "▁", ".", "  \t", "1234", "</div>", "ש"]
    mixed = ["".join(draw.choices(bits, k=400)) for _ in range(20)]
    return [*mixed, "a" * 900, " " * 900, "\n" * 900, "The old man by the sea. " * 40]


def test_parts_encode_as_the_whole(
    llm: dgemma.DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [llm.tokenizer.encode(text, special=False) for text in texts()]
    monkeypatch.setattr(module, "LONG_TEXT", 16)
    for text, expected in zip(texts(), whole, strict=True):
        parts = list(llm.tokenizer._parts(text))
        assert "".join(parts) == text
        assert llm.tokenizer.encode(text, special=False) == expected
    assert len(list(llm.tokenizer._parts("The old man by the sea. " * 40))) > 10


def test_parts_encode_as_the_whole_with_gemmas_own_vocabulary(
    gemma4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dgemma.File(gemma4 / "vocab.gguf") as file:
        tokenizer = Tokenizer(file.keys)
        whole = [tokenizer.encode(text, special=False) for text in texts()]
        monkeypatch.setattr(module, "LONG_TEXT", 16)
        assert [tokenizer.encode(text, special=False) for text in texts()] == whole


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    llm: dgemma.DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = llm.n_ctx() - llm.info.canvas_length
    n_bytes = room * llm.tokenizer.max_token_bytes
    llm.check_text_length("x" * n_bytes)

    def never(*_: object, **__: object) -> list[int]:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(Tokenizer, "encode", never)
    with pytest.raises(dgemma.ContextLengthError, match="at least") as problem:
        llm.generate("x" * (n_bytes + 1))
    assert problem.value.n_prompt_tokens == room + 1
    assert problem.value.n_ctx == 256


def test_a_prompt_that_is_too_long_names_both_numbers(llm: dgemma.DiffusionGemma) -> None:
    with pytest.raises(dgemma.ContextLengthError, match="maximum context length is 256") as problem:
        llm.generate([5] * 250)
    assert (problem.value.n_prompt_tokens, problem.value.n_ctx) == (250, 256)
