"""Odd but ordinary requests, as programs of all kinds send them, to every path: what comes of each.

A row says what is asked, and what is found: the answer's text, a warning, or an error's code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.clients import CAPITAL, PARIS, SUNNY, TOOL, events
from support.serving import running

QUESTION = [{"role": "user", "content": CAPITAL}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": PARIS}]
CHOICE = {"enum": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": CHOICE, "strict": True}}
THOUGHT = "France: Paris."


@pytest.fixture(scope="module")
def http(tiny_gguf: Path) -> Iterator[httpx.Client]:
    with (
        running(tiny_gguf) as (address, _),
        httpx.Client(base_url=address, timeout=120, trust_env=False) as client,
    ):
        yield client


def asked(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(path, json={"seed": 1, "max_denoising_steps": 16, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(http: httpx.Client, path: str, body: dict[str, Any]) -> tuple[str, str | None]:
    answer = http.post(path, json={"seed": 1, "max_denoising_steps": 16, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"]
    return error["code"], error["param"]


# ---- Chat ----------------------------------------------------------------------------------------

SAME: list[dict[str, Any]] = [
    {"modalities": ["text"]},
    {"prediction": {"type": "content", "content": "x"}},
    {"service_tier": "flex"},
    {"store": True, "metadata": {"a": "b"}},
    {"user": {"id": 1}},
    {"reasoning_effort": "none"},
    {"think": False},
    {"thinking": {"type": "disabled"}},
    {"reasoning": {"enabled": False}},
    {"reasoning_budget": 0},
    {"tools": [], "tool_choice": "auto"},
    {"tools": None, "tool_choice": None, "functions": None, "function_call": None},
    {"tool_choice": "none", "tools": [TOOL]},
    {"functions": [TOOL["function"]], "function_call": "none"},
    {"logprobs": False, "top_logprobs": 0},
    {"response_format": {"type": "text"}},
    {"response_format": "text"},
    {"response_format": {}},
    {"stop": [], "n": 1, "logit_bias": {}},
    {"stop": ["", None][:1], "stream": None},
    {"max_tokens": 10**9},
    {"seed": 1.0, "best_of": 1},
    {"random_seed": 1, "seed": None},
    {"top_p": 1, "top_k": -1, "min_p": 0, "presence_penalty": 0, "repeat_penalty": 1.0},
    {"model": 5},
    {"continue_final_message": False, "add_generation_prompt": True},
    {"messages": [{"role": "User", "content": CAPITAL, "name": "bob"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": CAPITAL, "x": 1}]}]},
    {"messages": [{"role": "user", "content": {"type": "text", "text": CAPITAL}}]},
    {"messages": [*QUESTION, {"role": "assistant", "content": None}]},
]


@pytest.mark.parametrize("body", SAME, ids=str)
def test_what_asks_for_nothing_else_gives_the_same(http: httpx.Client, body: Any) -> None:
    answer = asked(http, "/v1/chat/completions", {"messages": QUESTION, **body})
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": PARIS}
    assert "warnings" not in answer


@pytest.mark.parametrize(
    "body",
    [
        {"reasoning_effort": "low"},
        {"reasoning_effort": "xhigh"},
        {"reasoning": {"effort": "high"}},
        {"reasoning": {"enabled": True}},
        {"think": True},
        {"think": "medium"},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": {"type": "adaptive"}},
        {"enable_thinking": True},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ],
    ids=str,
)
def test_thinking_under_every_name(http: httpx.Client, body: Any) -> None:
    answer = asked(http, "/v1/chat/completions", {"messages": QUESTION, **body})
    assert answer["choices"][0]["message"]["reasoning_content"] == THOUGHT
    assert "warnings" not in answer


FORMS: list[dict[str, Any]] = [
    {"response_format": FORM},
    {"response_format": {"type": "json_schema", "schema": CHOICE}},
    {"response_format": {"type": "json_object", "schema": CHOICE}},
    {"response_format": {"type": "json", "value": CHOICE}},
    {"json_schema": CHOICE},
    {"guided_json": CHOICE},
    {"guided_json": json.dumps(CHOICE)},
    {"format": CHOICE},
    {"structured_outputs": {"json": CHOICE}},
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
@pytest.mark.parametrize("body", FORMS, ids=str)
def test_a_form_under_every_name(http: httpx.Client, path: str, body: Any) -> None:
    given = {"messages": QUESTION} if "chat" in path else {"prompt": "The old man"}
    answer = asked(http, path, {**given, "max_tokens": 16, **body})
    if path == "/completion":
        assert answer["content"] == '"a"'
    else:
        (choice,) = answer["choices"]
        assert choice.get("text", choice.get("message", {}).get("content")) == '"a"'


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"audio": {"voice": "alloy"}, "modalities": ["text", "audio"]}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"documents": [{"text": "b"}]}, "documents"),
        ({"options": {"num_ctx": 4096}}, "options"),
        ({"top_p": 0.1}, "top_p"),
        ({"tools": [{"type": "custom", "custom": {"name": "run"}}]}, "tools[0]"),
    ],
    ids=str,
)
def test_what_is_let_pass_is_named(http: httpx.Client, body: Any, told: str) -> None:
    answer = asked(http, "/v1/chat/completions", {"messages": QUESTION, **body})
    (warning,) = answer["warnings"]
    assert warning.startswith(told + " ")


PART = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"guided_choice": ["a"]}, "unsupported_parameter", "guided_choice"),
        ({"guided_regex": "a+"}, "unsupported_parameter", "guided_regex"),
        (
            {"structured_outputs": {"regex": "a"}},
            "unsupported_parameter",
            "structured_outputs.regex",
        ),
        ({"grammar": "root ::= x"}, "unsupported_parameter", "grammar"),
        ({"guided_json": "{"}, "invalid_value", "guided_json"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": 5}, "invalid_type", "response_format"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": "2"}, "invalid_type", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"stop": [1]}, "invalid_type", "stop"),
        ({"tools": TOOL}, "invalid_type", "tools"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"messages": []}, "invalid_type", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": [None]}, "invalid_type", "messages[0]"),
        ({"messages": [{"content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
        *(
            (
                {"messages": [{"role": "user", "content": [part]}]},
                "unsupported_content",
                "messages[0].content[0]",
            )
            for part in (
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
                {"type": "file", "file": {"file_id": "f"}},
                {"type": "video_url", "video_url": {"url": "x"}},
            )
        ),
    ],
    ids=str,
)
def test_what_would_mislead_is_refused(
    http: httpx.Client, body: Any, code: str, param: str
) -> None:
    given = {"messages": QUESTION, **body}
    assert refused(http, "/v1/chat/completions", given) == (code, param)


@pytest.mark.parametrize("name", ["n_predict", "num_predict", "max_output_tokens"])
def test_the_length_under_every_name(http: httpx.Client, name: str) -> None:
    answer = asked(http, "/v1/chat/completions", {"messages": QUESTION, name: 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_only_allowed_tools_are_called(http: httpx.Client) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {}}}
    allowed = {"mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    for choice in (
        {"type": "allowed_tools", "allowed_tools": allowed},
        {"type": "allowed_tools", **allowed},
    ):
        body = {
            "messages": [{"role": "user", "content": SUNNY}],
            "tools": [other, TOOL],
            "tool_choice": choice,
        }
        answer = asked(http, "/v1/chat/completions", body)
        calls = answer["choices"][0]["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} == {"get_weather"}


# ---- Texts, and llama.cpp's own ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_type", "prompt"),
        ({"prompt": [99999999]}, "invalid_value", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": "x", "logprobs": 0}, "unsupported_parameter", "logprobs"),
        ({"prompt": "x", "best_of": 2}, "unsupported_parameter", "best_of"),
        ({"prompt": "x", "guided_regex": "a"}, "unsupported_parameter", "guided_regex"),
    ],
    ids=str,
)
def test_wrong_texts(http: httpx.Client, body: Any, code: str, param: str) -> None:
    assert refused(http, "/v1/completions", body) == (code, param)


def test_several_prompts_in_llama_cpps_own_form(http: httpx.Client) -> None:
    body = {"prompt": ["a", "The old man"], "n_predict": 4}
    answer = http.post("/completion", json={"seed": 1, **body})
    whole = answer.json()
    assert [each["index"] for each in whole] == [0, 1]
    assert all(each["tokens_predicted"] <= 4 for each in whole)
    alone = [asked(http, "/completion", {**body, "prompt": p}) for p in body["prompt"]]
    assert [each["tokens_evaluated"] for each in whole] == [
        each["tokens_evaluated"] for each in alone
    ]
    streamed = http.post("/completion", json={"seed": 1, **body, "stream": True}).text
    told = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    for index, each in enumerate(whole):
        said = "".join(t["content"] for t in told if t["index"] == index)
        assert said == each["content"]
    assert [t["index"] for t in told if t["stop"]] == [0, 1]


def test_a_stop_text_is_named(http: httpx.Client) -> None:
    prompt = http.post("/apply-template", json={"messages": QUESTION}).json()["prompt"]
    answer = asked(http, "/completion", {"prompt": prompt, "stop": ["Rome", "Paris"]})
    assert answer["content"] == "The capital of France is "
    assert (answer["stop_type"], answer["stopping_word"]) == ("word", "Paris")
    body = {"messages": QUESTION, "max_tokens": 40, "stop_sequences": ["Paris"]}
    message = asked(http, "/v1/messages", body)
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "Paris")
    told = events(http.post("/v1/messages", json={**body, "stream": True, "seed": 1}))
    assert told[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "Paris"}


def test_warnings_in_llama_cpps_own_form(http: httpx.Client) -> None:
    answer = asked(http, "/completion", {"prompt": "a", "image_data": [{"data": "x"}]})
    assert answer["warnings"] == ["image_data is not known here and was ignored"]


def test_ollamas_paths_say_what_to_do(http: httpx.Client) -> None:
    for method, path in (("GET", "/api/tags"), ("POST", "/api/chat"), ("POST", "/api/generate")):
        answer = http.request(method, path, json={"model": "x"})
        assert answer.status_code == 404
        assert "Ollama's API" in answer.json()["error"]["message"]
        assert "/v1" in answer.json()["error"]["message"]


# ---- Responses and messages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"include": ["message.output_text.logprobs"]}, "unsupported_parameter", "include"),
        ({"top_logprobs": 3}, "unsupported_parameter", "top_logprobs"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
        ({"input": {"role": "user"}}, "invalid_type", "input"),
        ({"tool_choice": {"type": "web_search_preview"}}, "invalid_request", "tool_choice"),
    ],
    ids=str,
)
def test_wrong_responses(http: httpx.Client, body: Any, code: str, param: str) -> None:
    assert refused(http, "/v1/responses", {"input": CAPITAL, **body}) == (code, param)


@pytest.mark.parametrize(
    "body",
    [
        {"instructions": None, "conversation": None, "previous_response_id": None},
        {"truncation": "auto", "background": True, "service_tier": "auto"},
        {"include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"}},
        {"reasoning": {"effort": "minimal", "summary": "auto"}, "max_tool_calls": 3},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": CAPITAL}]}]},
        {"stream_options": {"include_obfuscation": False}, "prompt_cache_key": "k", "user": "x"},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    ],
    ids=str,
)
def test_responses_that_ask_for_nothing_else(http: httpx.Client, body: Any) -> None:
    answer = asked(http, "/v1/responses", {"input": CAPITAL, **body})
    (message,) = answer["output"]
    assert message["content"][0]["text"] == PARIS
    assert answer.get("warnings", []) == []


PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf"}}


@pytest.mark.parametrize(
    "body",
    [
        {"system": [], "metadata": {}, "tools": [], "stop_sequences": []},
        {"system": None, "thinking": None, "max_tokens": None},
        {"service_tier": "auto", "context_management": {"edits": []}, "betas": ["x"]},
        {"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}},
        {"messages": [{"role": "user", "content": [CAPITAL]}]},
        {
            "messages": [
                {"role": "user", "content": [PDF]},
                {"role": "assistant", "content": [{"type": "text", "text": "A contract."}]},
                *QUESTION,
            ]
        },
    ],
    ids=str,
)
def test_messages_that_ask_for_nothing_else(http: httpx.Client, body: Any) -> None:
    answer = asked(http, "/v1/messages", {"messages": QUESTION, "max_tokens": 40, **body})
    assert answer["content"] == [{"type": "text", "text": PARIS}]
    assert answer["stop_reason"] == "end_turn"
    assert answer.get("warnings", []) == []


@pytest.mark.parametrize(
    "block",
    [
        {"type": "document", "source": {"type": "text", "data": CAPITAL}},
        {
            "type": "document",
            "source": {"type": "content", "content": [{"type": "text", "text": CAPITAL}]},
        },
        {"type": "search_result", "source": "x", "content": [{"type": "text", "text": CAPITAL}]},
    ],
    ids=str,
)
def test_documents_of_text_are_read(http: httpx.Client, block: Any) -> None:
    messages = [{"role": "user", "content": [block]}]
    answer = asked(http, "/v1/messages", {"messages": messages, "max_tokens": 40})
    assert answer["content"] == [{"type": "text", "text": PARIS}]


def test_documents_that_are_no_text_are_refused(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": [PDF]}], "max_tokens": 4}
    assert refused(http, "/v1/messages", body) == ("unsupported_content", "messages[0].content[0]")
