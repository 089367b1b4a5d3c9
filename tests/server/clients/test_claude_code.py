"""Claude Code, by requests of its shape, written by hand, to /v1/messages."""

from __future__ import annotations

import json
from typing import Any

import httpx

from support.clients import CAPITAL, CLOUDY, PARAMETERS, PARIS, SUNNY, WEATHER, events

BETAS = (
    "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,"
    "prompt-caching-scope-2026-01-05"
)
HEADERS = {
    "accept": "application/json",
    "anthropic-beta": BETAS,
    "anthropic-dangerous-direct-browser-access": "true",
    "anthropic-version": "2023-06-01",
    "user-agent": "claude-cli/2.1.0 (external, cli)",
    "x-app": "cli",
    "x-stainless-lang": "js",
    "x-stainless-retry-count": "0",
}
CACHED = {"cache_control": {"type": "ephemeral"}}
SYSTEM = [
    {"type": "text", "text": "x-billing-header: version=2.1.0; entry=cli;"},
    {"type": "text", "text": "You are an agent for the command line.", **CACHED},
    {"type": "text", "text": "# Tone\nBe brief.\n# Tasks\nPlan, then act.", **CACHED},
]
READ = {
    "name": "Read",
    "description": "Reads a file.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "file_path": {"type": "string", "description": "An absolute path"},
            "limit": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
        },
        "required": ["file_path"],
        "additionalProperties": False,
    },
}
FETCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
WEATHER_TOOL = {
    "name": "get_weather",
    "description": "Weather in a city",
    "input_schema": {**PARAMETERS, "additionalProperties": False},
    **CACHED,
}
REMINDER = {"type": "text", "text": "<system-reminder>\nNo to-do list.\n</system-reminder>\n"}


def request(messages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "model": "claude-sonnet-4-5",
        "max_tokens": 32000,
        "stream": True,
        "messages": messages,
        "metadata": {"user_id": "user_ab_account_cd_session_ef"},
        "temperature": 1,
        "tools": [WEATHER_TOOL],
        "seed": 1,
        **changes,
    }


def sent(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of an answer, in the order that its client insists on."""
    told = [
        each
        for each in events(http.post("/v1/messages?beta=true", json=body, headers=HEADERS))
        if each["type"] != "ping"
    ]
    assert told[0]["type"] == "message_start"
    assert [each["type"] for each in told[-2:]] == ["message_delta", "message_stop"]
    open_index = None
    for each in told[1:-2]:
        if each["type"] == "content_block_start":
            assert open_index is None
            open_index = each["index"]
        assert each["index"] == open_index
        if each["type"] == "content_block_stop":
            open_index = None
    assert open_index is None
    return told


def text_of(told: list[dict[str, Any]]) -> str:
    deltas = [each["delta"] for each in told if each["type"] == "content_block_delta"]
    return "".join(d["text"] for d in deltas if d["type"] == "text_delta")


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, **CACHED}


def test_a_tool_is_called_and_its_result_answered(http: httpx.Client) -> None:
    messages = [user(said(SUNNY))]
    told = sent(http, request(messages))
    (begun,) = (e["content_block"] for e in told if e["type"] == "content_block_start")
    assert (begun["type"], begun["name"], begun["input"]) == ("tool_use", "get_weather", {})
    deltas = [e["delta"] for e in told if e["type"] == "content_block_delta"]
    given = json.loads("".join(delta["partial_json"] for delta in deltas))
    assert given == {"city": "Oslo"}
    assert told[-2]["delta"]["stop_reason"] == "tool_use"
    used = {"type": "tool_use", "id": begun["id"], "name": "get_weather", "input": given}
    result = {
        "type": "tool_result",
        "tool_use_id": begun["id"],
        "is_error": False,
        "content": WEATHER,
        **CACHED,
    }
    messages += [{"role": "assistant", "content": [used]}, user(result)]
    told = sent(http, request(messages))
    assert text_of(told) == CLOUDY
    assert told[-2]["delta"]["stop_reason"] == "end_turn"
    usage = told[-2]["usage"]
    assert usage["cache_read_input_tokens"] > 0
    counted = http.post("/v1/messages/count_tokens?beta=true", json=request(messages)).json()
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_all_that_it_says_before_it_asks(http: httpx.Client) -> None:
    # models/tiny was not taught what such an agent is told: it must answer, whatever it says.
    body = request(
        [user(REMINDER, said(CAPITAL))],
        system=SYSTEM,
        tools=[READ, FETCH, WEATHER_TOOL],
        max_tokens=64,
        thinking={"type": "enabled", "budget_tokens": 31999},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    told = sent(http, body)
    assert told[-2]["delta"]["stop_reason"] in ("end_turn", "max_tokens", "tool_use")
    warnings = told[0]["message"]["warnings"]
    assert [w for w in warnings if "web_search_20250305" in w] == warnings != []


def test_thoughts_come_first_and_can_be_sent_again(http: httpx.Client) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    messages = [user(said(CAPITAL))]
    told = sent(http, request(messages, tools=[], thinking=thinking))
    kinds = [e["content_block"]["type"] for e in told if e["type"] == "content_block_start"]
    assert kinds == ["thinking", "text"]
    assert text_of(told) == PARIS
    deltas = [e["delta"] for e in told if e["type"] == "content_block_delta"]
    signatures = [d["signature"] for d in deltas if d["type"] == "signature_delta"]
    assert len(signatures) == 1
    thought = "".join(d["thinking"] for d in deltas if d["type"] == "thinking_delta")
    assert thought
    blocks = [
        {"type": "thinking", "thinking": thought, "signature": signatures[0]},
        {"type": "text", "text": PARIS},
    ]
    messages += [{"role": "assistant", "content": blocks}]
    messages += [user(said("Name the opposite of loud."))]
    told = sent(http, request(messages, tools=[], thinking={"type": "adaptive"}))
    assert text_of(told) == "The opposite of loud is quiet."


def test_its_probe_and_its_titles(http: httpx.Client) -> None:
    probe = {"model": "claude-haiku", "max_tokens": 1, "messages": [user(said("quota"))]}
    answer = http.post("/v1/messages?beta=true", json=probe, headers=HEADERS).json()
    assert answer["usage"]["output_tokens"] <= 1
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string", "maxLength": 12}},
        "required": ["title"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "schema": schema}}
    body = request([user(said(CAPITAL))], tools=[], output_config=form, max_tokens=256)
    title = json.loads(text_of(sent(http, body)))
    assert list(title) == ["title"]
    assert len(title["title"]) <= 12


def test_what_is_wrong_is_told_in_its_form(http: httpx.Client) -> None:
    long = [user(said("word " * 5000))]
    answer = http.post("/v1/messages?beta=true", json=request(long), headers=HEADERS)
    assert answer.status_code == 400
    told = answer.json()
    assert told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert told["error"]["code"] == "context_length_exceeded"
