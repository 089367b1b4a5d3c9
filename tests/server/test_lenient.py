"""What ordinary clients send as a matter of course is accepted and named; `--strict` refuses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.serving import QUESTION, ask, running


@pytest.fixture(scope="module")
def strict(tiny_gguf: Path) -> Iterator[httpx.Client]:
    with (
        running(tiny_gguf, "--strict") as (address, _),
        httpx.Client(base_url=address, timeout=120, trust_env=False) as http,
    ):
        yield http


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
@pytest.mark.parametrize("odd", [-(2**63), 1, [1], {"a": 1}, True])
def test_a_suffix_is_a_text(http: httpx.Client, path: str, odd: object) -> None:
    answer = http.post(path, json={"prompt": "x", "suffix": odd, "max_tokens": 4})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "suffix"


KNOBS: list[dict[str, Any]] = [
    {"top_p": 0.95},
    {"top_k": 40},
    {"min_p": 0.05},
    {"frequency_penalty": 0.3},
    {"presence_penalty": 1},
    {"repeat_penalty": 1.1},
    {"repetition_penalty": 1.2},
    {"logit_bias": {"5": -100}},
    {"typical_p": 0.5},
    {"mirostat": 2},
    {"dry_multiplier": 0.8},
    {"xtc_probability": 0.5},
]
UNKNOWN: list[dict[str, Any]] = [{"frobnicate": 1}, {"enable_thoughts": True}]


@pytest.mark.parametrize("changes", [*KNOBS, *UNKNOWN], ids=lambda c: next(iter(c)))
def test_knobs_without_effect_are_named(
    http: httpx.Client, strict: httpx.Client, changes: dict[str, Any]
) -> None:
    (name,) = changes
    plain, answer = ask(http), ask(http, **changes)
    assert answer.status_code == 200
    assert answer.json()["choices"] == plain.json()["choices"]
    (warning,) = answer.json()["warnings"]
    assert warning.startswith(name)
    assert answer.headers["x-dgemma-warnings"] == warning
    refused = ask(strict, **changes)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == name
    assert error["code"] in ("unsupported_parameter", "unknown_parameter")


@pytest.mark.parametrize("name", ["", " ", "\n", "a: b\r\nc", "é🦙", "\x7f", "x" * 5000])
def test_names_that_are_no_headers_are_named_too(http: httpx.Client, name: str) -> None:
    """A header that HTTP does not allow would leave the client without any answer."""
    for stream in (False, True):
        answer = ask(http, **{name: 1, "stream": stream})
        assert answer.status_code == 200
        assert answer.headers["x-dgemma-warnings"].isprintable()
    assert answer.headers["x-dgemma-warnings"] == answer.headers["x-dgemma-warnings"].strip()


NOTES: list[dict[str, Any]] = [
    {"prompt_cache_key": "k"},
    {"safety_identifier": "s"},
    {"service_tier": "auto"},
    {"verbosity": "low"},
    {"keep_alive": "5m"},
    {"cache_prompt": True},
    {"repetition_penalty": 1.0},
    {"prediction": None},
    {"functions": None},
    {"extra_body": {}},
    {"metadata": {"a": 1}},
    {"stream": None},
    {"typical_p": 1.0},
    {"mirostat": 0},
    {"dry_multiplier": 0.0},
    {"prompt_logprobs": None},
    {"logprobs": False},
    {"user": "me"},
    {"seed": 1.0},
    {"n": 1},
]


@pytest.mark.parametrize("changes", NOTES, ids=lambda c: next(iter(c)))
def test_what_asks_for_nothing_is_let_pass(
    http: httpx.Client, strict: httpx.Client, changes: dict[str, Any]
) -> None:
    for client in (http, strict):
        answer = ask(client, **changes)
        assert answer.status_code == 200, answer.text
        assert "warnings" not in answer.json()
        assert "x-dgemma-warnings" not in answer.headers


def test_whole_floats_are_whole_numbers(http: httpx.Client) -> None:
    answers = [ask(http, max_tokens=n).json()["choices"] for n in (4, 4.0)]
    assert answers[0] == answers[1]


def test_temperature_zero_gives_the_same_answer_every_time(http: httpx.Client) -> None:
    body = {"messages": QUESTION, "temperature": 0}
    answers = [http.post("/v1/chat/completions", json=body).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert "Paris" in answers[0]["choices"][0]["message"]["content"]


def test_a_stream_names_what_was_ignored_in_its_first_chunk(http: httpx.Client) -> None:
    lines = ask(http, stream=True, top_p=0.5).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [len(chunk.get("warnings", ())) for chunk in chunks] == [1] + [0] * (len(chunks) - 1)


MISLEADING = [
    ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ({"logprobs": True, "top_logprobs": 5}, "logprobs", "unsupported_parameter"),
    ({"grammar": 'root ::= "x"'}, "grammar", "unsupported_parameter"),
    ({"max_tokens": -5}, "max_tokens", "invalid_value"),
    ({"max_tokens": "many"}, "max_tokens", "invalid_type"),
    ({"n": 1000}, "n", "invalid_value"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"messages": None}, "messages", "invalid_type"),
    ({"stream_options": 5, "stream": True}, "stream_options", "invalid_type"),
]


@pytest.mark.parametrize(("changes", "param", "code"), MISLEADING, ids=str)
def test_what_would_mislead_is_refused(
    http: httpx.Client, changes: dict[str, Any], param: str, code: str
) -> None:
    answer = ask(http, **changes)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert isinstance(error["message"], str)
    assert error["type"] == "invalid_request_error"


# ---- Several answers, several prompts ------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_have_the_seeds_that_follow(http: httpx.Client, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 8}

    def text(seed: int) -> str:
        answer = http.post("/v1/chat/completions", json={**body, "seed": seed}).json()
        return str(answer["choices"][0]["message"]["content"])

    several = http.post("/v1/chat/completions", json={**body, "seed": 3, "n": 3, "stream": stream})
    texts = [""] * 3
    if stream:
        lines = several.text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [c["choices"][0]["delta"].get("role") for c in chunks[:3]] == ["assistant"] * 3
        for chunk in chunks:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
    else:
        for choice in several.json()["choices"]:
            texts[choice["index"]] += choice["message"]["content"]
    assert texts == [text(3), text(4), text(5)]


@pytest.mark.parametrize("prompt", [["a", "b"], ["The old man"], [[2, 5], [2, 6]], [2, 5]])
def test_lists_of_prompts(http: httpx.Client, prompt: list[Any]) -> None:
    body = {"prompt": prompt, "max_tokens": 4, "seed": 1}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    several = [prompt] if isinstance(prompt[0], int) else prompt
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(several)))
    for choice, one in zip(choices, several, strict=True):
        alone = http.post("/v1/completions", json={**body, "prompt": one}).json()
        assert choice["text"] == alone["choices"][0]["text"]


# ---- Tools ---------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": "get_weather"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": ["auto"]}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": 5}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
    ids=str,
)
def test_odd_tools_are_400(http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    answer = ask(http, **changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_tools_that_run_elsewhere_are_named(http: httpx.Client, strict: httpx.Client) -> None:
    tools = [TOOL, {"type": "web_search"}]
    answer = ask(http, tools=tools)
    assert answer.status_code == 200
    assert answer.json()["warnings"] == [
        "tools[1] is a tool of type 'web_search': only functions can be called here"
    ]
    assert ask(strict, tools=tools).json()["error"]["param"] == "tools[1]"
