"""What a request may ask for, and where an answer is cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.generation.generate import _Cutter
from dgemma.generation.options import Options, make_options
from dgemma.tokenizer import BYTE, CONTROL, NORMAL, Tokenizer
from dgemma.values import Sampling

MODEL = Sampling(t_min=0.4, t_max=0.8)
LETTERS = "abc"
TOKENS = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, "ab", "bca"]
END = 0
TOKENIZER = Tokenizer(
    {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [CONTROL] + [BYTE] * 256 + [NORMAL] * 5,
        "tokenizer.ggml.merges": ["a b"],
    }
)


def test_the_models_own_sampling_is_the_default() -> None:
    assert make_options(MODEL).sampling == MODEL
    assert make_options(MODEL, temperature=1).sampling == MODEL


def test_temperature_scales_both_ends() -> None:
    sampling = make_options(MODEL, temperature=0.5).sampling
    assert (sampling.t_min, sampling.t_max) == (0.2, 0.4)


def test_sampling_by_name() -> None:
    sampling = make_options(MODEL, t_max=0.9, max_denoising_steps=3).sampling
    assert (sampling.t_min, sampling.t_max, sampling.max_denoising_steps) == (0.4, 0.9, 3)


def test_no_seed_is_a_new_seed() -> None:
    assert make_options(MODEL).seed != make_options(MODEL).seed
    assert make_options(MODEL, seed=-1).seed != make_options(MODEL, seed=-1).seed
    assert make_options(MODEL, seed=7).seed == 7


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e9},
        {"t_min": 0.9},
        {"entropy_bound": 0.0},
        {"entropy_bound": float("inf")},
        {"max_denoising_steps": 0},
        {"max_denoising_steps": 10**9},
        {"stability_threshold": -1},
        {"stability_threshold": 65},
        {"max_tokens": 0},
        {"max_tokens": -2},
        {"seed": 2**64},
        {"stop": ["x"] * 33},
    ],
)
def test_values_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make_options(MODEL, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "1"},
        {"max_denoising_steps": 1.5},
        {"max_tokens": True},
        {"seed": 1.0},
        {"stop": [1]},
        {"no_such_option": 1},
    ],
)
def test_values_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        make_options(MODEL, **options)


@pytest.mark.parametrize(
    ("name", "neutral", "meant"),
    [
        ("top_p", 1.0, 0.9),
        ("top_k", 0, 40),
        ("min_p", 0.0, 0.05),
        ("repeat_penalty", 1.0, 1.1),
        ("presence_penalty", 0, 0.5),
        ("frequency_penalty", 0.0, 0.5),
        ("logprobs", False, True),
        ("logit_bias", {}, {"1": 5}),
        ("n", 1, 2),
        ("grammar", None, "root ::= x"),
    ],
)
def test_what_means_nothing_is_refused_unless_neutral(name: str, neutral: Any, meant: Any) -> None:
    assert make_options(MODEL, **{name: neutral}).sampling == MODEL
    with pytest.raises(ValueError, match=f"{name} is not supported: "):
        make_options(MODEL, **{name: meant})


def cut(tokens: list[int], borders: list[int], **options: Any) -> tuple[str, list[int], str]:
    """Text, tokens and reason when the tokens come in canvases with these borders."""
    cutter = _Cutter(TOKENIZER, [END], Options(MODEL, 0, **options))
    text = ""
    for start, stop in itertools.pairwise([0, *borders, len(tokens)]):
        piece, reason = cutter.add(tokens[start:stop])
        text += piece
        if reason is not None:
            return text, cutter.tokens, reason
    return text + cutter.finish(), cutter.tokens, "length"


def expected_text(tokens: list[int], stops: tuple[str, ...]) -> str:
    """Up to the first stop string that is whole: what would come behind it is never made."""
    tokens = list(itertools.takewhile(lambda token: token != END, tokens))
    for n in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:n])
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)]
    return TOKENIZER.decode(tokens)


@given(
    st.lists(st.integers(257, len(TOKENS) - 1) | st.just(END), max_size=20),
    st.lists(st.integers(0, 20), max_size=4),
    st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_borders_change_nothing(tokens: list[int], borders: list[int], stops: list[str]) -> None:
    borders = sorted(min(border, len(tokens)) for border in borders)
    text, kept, reason = cut(tokens, borders, stop=tuple(stops))
    expected = expected_text(tokens, tuple(stops))
    assert text == expected
    # The tokens kept are those that the text needs, and no more.
    whole = TOKENIZER.decode(kept)
    assert whole.startswith(text)
    assert not kept or not TOKENIZER.decode(kept[:-1]).startswith(text) or whole == text
    ended = END in tokens or any(s in TOKENIZER.decode(tokens) for s in stops)
    assert reason == ("stop" if ended else "length")


@given(st.lists(st.integers(257, len(TOKENS) - 1), min_size=1, max_size=20), st.integers(1, 20))
@settings(deadline=None)
def test_max_tokens(tokens: list[int], limit: int) -> None:
    text, kept, reason = cut(tokens, [len(tokens) // 2], max_tokens=limit)
    assert kept == tokens[:limit]
    assert text == TOKENIZER.decode(kept)
    assert reason == "length"


def test_an_end_token_right_behind_the_limit_is_an_end() -> None:
    a = TOKENS.index("a")
    assert cut([a, a, END], [], max_tokens=2) == ("aa", [a, a], "stop")


def test_a_character_over_a_border() -> None:
    tokens = [TOKENS.index(f"<0x{byte:02X}>") for byte in "é🦙".encode()]
    for border in range(len(tokens)):
        assert cut(tokens, [border])[0] == "é🦙"
    assert cut(tokens[:-1], [])[0] == "é\ufffd"
