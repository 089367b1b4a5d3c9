"""Codex, by requests of its shape, written by hand, to /v1/responses."""

from __future__ import annotations

import json
from typing import Any

import httpx

from support.clients import CAPITAL, CLOUDY, PARAMETERS, PARIS, SUNNY, WEATHER, events

HEADERS = {
    "Accept": "text/event-stream",
    "originator": "codex_cli_rs",
    "session_id": "0199c2f4-1111-7000-8000-000000000000",
    "conversation_id": "0199c2f4-1111-7000-8000-000000000000",
    "version": "0.60.1",
    "User-Agent": "codex_cli_rs/0.60.1 (Linux; x86_64) terminal",
}
GET_WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather in a city",
    "strict": False,
    "parameters": {**PARAMETERS, "additionalProperties": False},
}
SHELL = {
    "type": "function",
    "name": "shell",
    "description": "Runs a command.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}},
            "timeout_ms": {"type": "number", "description": "Milliseconds"},
        },
        "required": ["command"],
        "additionalProperties": False,
    },
}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
}
ELSEWHERE = [{"type": "local_shell"}, {"type": "web_search", "external_web_access": True}]


def said(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def request(items: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "model": "gpt-5-codex",
        "instructions": "",
        "input": items,
        "tools": [GET_WEATHER],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": None,
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": HEADERS["session_id"],
        "seed": 1,
        **changes,
    }


def sent(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of an answer: numbered, and with a whole response at the end."""
    told = events(http.post("/v1/responses", json=body, headers=HEADERS))
    assert [each["sequence_number"] for each in told] == list(range(len(told)))
    assert told[0]["type"] == "response.created"
    assert told[0]["response"]["id"] == told[-1]["response"]["id"]
    # It takes the items as they are done, and they are those of the whole response.
    done = [each["item"] for each in told if each["type"] == "response.output_item.done"]
    assert done == told[-1]["response"]["output"]
    return told


def test_a_tool_is_called_and_its_result_answered(http: httpx.Client) -> None:
    items = [said("user", SUNNY)]
    last = sent(http, request(items))[-1]
    assert last["type"] == "response.completed"
    (call,) = last["response"]["output"]
    assert (call["type"], call["name"]) == ("function_call", "get_weather")
    assert json.loads(call["arguments"]) == {"city": "Oslo"}
    again = {name: call[name] for name in ("type", "name", "arguments", "call_id")}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": WEATHER}
    last = sent(http, request([*items, again, result]))[-1]
    (message,) = last["response"]["output"]
    assert message["content"][0]["text"] == CLOUDY
    usage = last["response"]["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_all_that_it_says_before_it_asks(http: httpx.Client) -> None:
    # models/tiny was not taught what such an agent is told: it must answer, whatever it says.
    context = "<environment_context>\n  <cwd>/src</cwd>\n</environment_context>"
    body = request(
        [said("developer", "Ask before you write."), said("user", context), said("user", CAPITAL)],
        instructions="You are a coding agent.\n\n# Style\nBe brief.\n",
        tools=[SHELL, PATCH, GET_WEATHER, *ELSEWHERE],
        reasoning={"effort": "none", "summary": "auto"},
        text={"verbosity": "medium"},
    )
    last = sent(http, body)[-1]
    assert last["type"] in ("response.completed", "response.incomplete")
    named = [warning.partition(":")[0] for warning in last["response"]["warnings"]]
    assert named == [
        "tools[3] is a tool of type 'local_shell'",
        "tools[4] is a tool of type 'web_search'",
    ]


def test_reasoning_comes_first_and_can_be_sent_again(http: httpx.Client) -> None:
    items = [said("user", CAPITAL)]
    thinks = {"reasoning": {"effort": "medium", "summary": "auto"}, "tools": []}
    told = sent(http, request(items, **thinks))
    thought, message = told[-1]["response"]["output"]
    assert (thought["type"], message["type"]) == ("reasoning", "message")
    deltas = [e["delta"] for e in told if e["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == thought["content"][0]["text"] != ""
    deltas = [e["delta"] for e in told if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == message["content"][0]["text"] == PARIS
    items += [thought, message, said("user", "Name the opposite of loud.")]
    last = sent(http, request(items, **thinks))[-1]["response"]
    assert last["output"][-1]["content"][0]["text"] == "The opposite of loud is quiet."


def test_its_history_of_every_kind_is_taken(http: httpx.Client) -> None:
    """What it keeps of a session is sent again as it is, also after an answer was stopped."""
    action = {"type": "exec", "command": ["ls"], "env": {}}
    patch = "*** Begin Patch\n*** End Patch"
    items = [
        said("user", SUNNY),
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "content": None},
        {"type": "local_shell_call", "call_id": "c1", "status": "completed", "action": action},
        {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": patch},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
        {"type": "web_search_call", "status": "completed", "action": {"type": "search"}},
        {"type": "function_call", "call_id": "c3", "name": "shell", "arguments": '{"comm'},
        {"type": "function_call_output", "call_id": "c3", "output": "aborted"},
        said("assistant", "Done."),
        said("user", CAPITAL),
    ]
    last = sent(http, request(items, max_output_tokens=32))[-1]
    assert last["type"] in ("response.completed", "response.incomplete")


def test_a_thought_that_is_only_referred_to_is_let_pass(http: httpx.Client) -> None:
    items = [said("user", CAPITAL), {"type": "item_reference", "id": "rs_1"}]
    (message,) = sent(http, request(items, tools=[]))[-1]["response"]["output"]
    assert message["content"][0]["text"] == PARIS


def test_its_list_of_models(http: httpx.Client) -> None:
    answer = http.get("/v1/models", params={"client_version": "0.60.1"}, headers=HEADERS)
    assert [each["id"] for each in answer.json()["data"]] == ["tiny"]


def test_a_conversation_that_is_too_long_has_the_code_it_looks_for(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json=request([said("user", "word " * 5000)]))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
