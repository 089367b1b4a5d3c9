"""Agents in an editor: Continue and Cline, by requests of their shape, written by hand."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from support.clients import (
    CAPITAL,
    CLOUDY,
    PARIS,
    STORY,
    SUNNY,
    TOOL,
    WEATHER,
    call_of,
    chunks,
    text_of,
)
from support.serving import KEY

RULES = {"role": "system", "content": "<rules>\nAnswer in one line.\n</rules>"}
STRICT = {"type": "function", "function": {**TOOL["function"], "strict": False}}


def continues(messages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """What Continue sends for a chat."""
    return {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 4096,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [STRICT],
        "parallel_tool_calls": False,
        "seed": 1,
        **changes,
    }


def clines(messages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """What Cline sends for a task."""
    return {
        "model": "tiny",
        "messages": messages,
        "temperature": 0,
        "reasoning_effort": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "seed": 1,
        **changes,
    }


def asks(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Continue gives its key in two headers."""
    headers = {"api-key": KEY, "x-api-key": KEY, "Content-Type": "application/json"}
    return chunks(http.post("/v1/chat/completions", json=body, headers=headers))


@pytest.mark.parametrize("made", [continues, clines])
def test_a_tool_is_called_and_its_result_answered(http: httpx.Client, made: Any) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": SUNNY}]}
    ]
    first = asks(http, made(messages))
    call = call_of(first)
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert [c["finish_reason"] for chunk in first for c in chunk["choices"]][-1] == "tool_calls"
    assert first[-1]["usage"]["total_tokens"] > first[-1]["usage"]["prompt_tokens"] > 0
    messages += [
        {"role": "assistant", "content": text_of(first), "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": WEATHER},
    ]
    assert text_of(asks(http, made(messages))) == CLOUDY


@pytest.mark.parametrize("made", [continues, clines])
def test_a_chat_with_tools_that_it_need_not_call(http: httpx.Client, made: Any) -> None:
    told = asks(http, made([{"role": "user", "content": "Reverse the list: fox lamp river"}]))
    assert text_of(told) == "river lamp fox"
    assert not any(c["delta"].get("tool_calls") for chunk in told for c in chunk["choices"])


def test_all_that_cline_says_before_it_asks(http: httpx.Client) -> None:
    # models/tiny was not taught what such an agent is told: it must answer, whatever it says.
    system = {"role": "system", "content": "You are an agent.\n\n# Tools\n" + "Use them.\n" * 40}
    parts = [
        {"type": "text", "text": f"<task>\n{CAPITAL}\n</task>"},
        {"type": "text", "text": "<environment_details>\n# Files\na.py\n</environment_details>"},
    ]
    told = asks(http, clines([system, {"role": "user", "content": parts}], max_tokens=64))
    reasons = [c["finish_reason"] for chunk in told for c in chunk["choices"]]
    assert reasons[-1] in ("stop", "length", "tool_calls")
    assert set(reasons[:-1]) == {None}
    assert told[-1]["usage"]["completion_tokens"] <= 64


def test_continues_rules_and_its_title_of_a_chat(http: httpx.Client) -> None:
    told = asks(http, continues([RULES, {"role": "user", "content": CAPITAL}], tools=None))
    assert "Paris" in text_of(told)
    title = continues([{"role": "user", "content": CAPITAL}], tools=None, stream=False)
    title = {**title, "stream_options": None, "max_tokens": 32, "parallel_tool_calls": None}
    answer = http.post("/v1/chat/completions", json=title).json()
    assert answer["choices"][0]["message"]["content"] == PARIS


def test_continues_autocomplete(http: httpx.Client) -> None:
    stops = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "\n\n", "/src/", "```"]
    body = {
        "model": "tiny",
        "prompt": STORY,
        "suffix": " lake.",
        "max_tokens": 6,
        "temperature": 0.01,
        "stop": stops,
        "stream": True,
        "seed": 1,
    }
    told = chunks(http.post("/v1/completions", json=body))
    text = "".join(choice["text"] for chunk in told for choice in chunk["choices"])
    whole = http.post("/v1/completions", json={**body, "stream": False}).json()
    assert whole["choices"][0]["text"] == text != ""
    assert not any(stop in text for stop in stops)
