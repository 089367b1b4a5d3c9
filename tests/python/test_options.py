"""What a request may ask for, and where an answer is cut."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma._native import MAX_DENOISING_STEPS
from dgemma.compat.requests import (
    Accepted,
    AnswerOptions,
    ChatOptions,
    CompletionOptions,
    accept,
)
from dgemma.errors import OptionError, OptionTypeError, OptionValueError
from dgemma.generation.cut import Cutter
from dgemma.generation.declared import RequestOptions, SamplingOptions, declared, names
from dgemma.generation.options import FLOOR, Options, make_options
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
        {"seed": 1.5},
        {"stop": 5},
        {"stop": [1]},
        {"no_such_option": 1},
    ],
)
def test_values_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        make_options(MODEL, **options)


def test_whole_numbers_may_be_written_as_floats() -> None:
    options = make_options(MODEL, max_tokens=8.0, seed=5.0, max_denoising_steps=np.float64(3))
    assert (options.max_tokens, options.seed) == (8, 5)
    assert options.sampling.max_denoising_steps == 3
    assert all(type(n) is int for n in (options.max_tokens, options.seed))


def test_none_is_as_good_as_absent() -> None:
    absent = dict.fromkeys(names(RequestOptions))
    found = make_options(MODEL, **absent)
    assert (found.sampling, found.max_tokens, found.stop) == (MODEL, None, ())


def test_temperature_zero_is_the_floor_and_deterministic() -> None:
    options = make_options(MODEL, temperature=0)
    assert (options.sampling.t_min, options.sampling.t_max) == (0.4 * FLOOR, 0.8 * FLOOR)
    assert options.seed == make_options(MODEL, temperature=0.0).seed
    assert make_options(MODEL, temperature=0, seed=7).seed == 7
    # What is below the floor is the floor: nothing between 0 and it is colder than 0.
    assert make_options(MODEL, temperature=FLOOR / 2).sampling == options.sampling


def test_errors_name_the_option() -> None:
    for options, code in (
        ({"temperature": 11}, "invalid_value"),
        ({"max_tokens": "many"}, "invalid_type"),
        ({"seed": 2**64}, "invalid_value"),
        ({"no_such_option": 1}, "unknown_parameter"),
        ({"temperature": 10**5000}, "invalid_value"),
        ({"seed": 10**5000}, "invalid_value"),
    ):
        with pytest.raises(OptionError) as found:
            make_options(MODEL, **options)
        assert (found.value.param, found.value.code) == (next(iter(options)), code)


def test_bounds_are_those_of_the_engine() -> None:
    known = declared(SamplingOptions)
    assert set(known) == set(Sampling.__annotations__)
    assert known["max_denoising_steps"].option.high == MAX_DENOISING_STEPS
    most = make_options(MODEL, max_denoising_steps=MAX_DENOISING_STEPS)
    assert most.sampling.max_denoising_steps == MAX_DENOISING_STEPS
    with pytest.raises(ValueError, match="at most 100000"):
        make_options(MODEL, max_denoising_steps=MAX_DENOISING_STEPS + 1)


# ---- Options of other programs -------------------------------------------------------------------

KNOBS = [
    ("top_p", 1.0, 0.9),
    ("top_k", 0, 40),
    ("top_k", -1, 1),
    ("min_p", 0.0, 0.05),
    ("typical_p", 1, 0.7),
    ("tfs_z", 1.0, 0.5),
    ("mirostat_mode", 0, 2),
    ("mirostat_tau", 5.0, 3.0),
    ("dry_multiplier", 0.0, 0.8),
    ("xtc_probability", 0, 0.5),
    ("repeat_penalty", 1.0, 1.1),
    ("repetition_penalty", 1.0, 1.1),
    ("presence_penalty", 0, 0.5),
    ("frequency_penalty", 0.0, 0.5),
    ("logit_bias", {}, {"1": 5}),
    ("logits_processor", None, [len]),
    ("samplers", None, ["top_k"]),
]


@pytest.mark.parametrize(("name", "neutral", "meant"), KNOBS)
@pytest.mark.parametrize("kind", [AnswerOptions, CompletionOptions, ChatOptions])
def test_what_means_nothing_is_named_unless_neutral(
    kind: type[Any], name: str, neutral: Any, meant: Any
) -> None:
    for value in (neutral, None):
        assert accept({name: value, "seed": 1}, kind, strict=True) == Accepted({"seed": 1})
    found = accept({name: meant, "seed": 1}, kind)
    assert found.options == {"seed": 1}
    (warning,) = found.warnings
    assert warning.startswith(f"{name} has no effect: ")
    with pytest.raises(OptionValueError, match=f"{name} is not supported: ") as refused:
        accept({name: meant}, kind, strict=True)
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "neutral", "meant"),
    [
        ("logprobs", False, True),
        ("logprobs", None, 5),
        ("logprobs", None, 0),  # the probability of the token itself, in text completions
        ("top_logprobs", 0, 2),
        ("n_probs", 0, 1),
        ("grammar", "", "root ::= x"),
        ("best_of", 1, 3),
        ("stopping_criteria", None, [len]),
    ],
)
def test_what_would_mislead_is_refused(name: str, neutral: Any, meant: Any) -> None:
    assert accept({name: neutral}, ChatOptions) == Accepted({})
    with pytest.raises(OptionValueError, match=f"{name} is not supported: ") as refused:
        accept({name: meant}, ChatOptions)
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")
    if name == "best_of":
        assert accept({"n": 3, "best_of": 3}, CompletionOptions).options == {"n": 3}


def test_unknown_names() -> None:
    with pytest.raises(OptionTypeError, match="'max_token'; did you mean 'max_tokens'"):
        accept({"max_token": 3}, ChatOptions)
    found = accept({"service_tier": "auto", "prediction": None}, ChatOptions, unknown="ignore")
    assert found == Accepted({}, ("service_tier is not known here and was ignored",))
    with pytest.raises(OptionTypeError, match="service_tier"):
        accept({"service_tier": "auto"}, ChatOptions, unknown="ignore", strict=True)


def test_every_request_that_is_really_sent_is_accepted() -> None:
    bodies = {
        "openai": {"user": "me", "parallel_tool_calls": True, "n": 1, "stream": True},
        "langchain": {"n": 1, "temperature": 0.7, "top_p": 1, "logit_bias": None, "best_of": 1},
        "open webui": {"num_ctx": 4096, "mirostat": 0, "repeat_last_n": 64, "tfs_z": 1, "seed": 0},
        "llama.cpp": {
            "cache_prompt": True,
            "samplers": "edkypmxt",
            "dry_base": 1.75,
            "min_p": 0.05,
        },
        "vllm": {"repetition_penalty": 1.0, "ignore_eos": False, "skip_special_tokens": True},
    }
    kept = {
        name: set(accept(body, ChatOptions, unknown="ignore", also=("stream",)).options)
        for name, body in bodies.items()
    }
    assert kept == {
        "openai": {"n", "stream"},
        "langchain": {"n", "temperature"},
        "open webui": {"seed"},
        "llama.cpp": set(),
        "vllm": set(),
    }


def cut(tokens: list[int], borders: list[int], **options: Any) -> tuple[str, list[int], str]:
    """Text, tokens and reason when the tokens come in canvases with these borders."""
    cutter = Cutter(TOKENIZER, [END], Options(MODEL, 0, **options))
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
