"""What programs of others are asked to do: questions that models/tiny answers, and its tools."""

from __future__ import annotations

import json
from typing import Any

import httpx

CAPITAL = "What is the capital of France?"
PARIS = "The capital of France is Paris."
SUNNY = "Is it sunny in Oslo?"
WEATHER = '{"sky": "cloudy", "degrees": 12}'
CLOUDY = "It is cloudy in Oslo, 12 degrees."
STORY = "Once there was a small owl that lived near the lake. One day"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
    "required": ["city"],
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": PARAMETERS,
    },
}


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a streamed chat; comments are left out, and the end is checked."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.strip("\n").split("\n\n")
    told = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert told[-1] == "[DONE]"
    return [json.loads(each) for each in told[:-1]]


def text_of(told: list[dict[str, Any]]) -> str:
    """The text that the chunks of a chat tell."""
    deltas = [choice["delta"] for chunk in told for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def call_of(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The one call that the chunks of a chat tell, put together as clients do it."""
    deltas = [choice["delta"] for chunk in told for choice in chunk["choices"]]
    parts = [part for delta in deltas for part in delta.get("tool_calls") or []]
    assert {part["index"] for part in parts} == {0}
    named = next(part for part in parts if part.get("id"))
    arguments = "".join(part["function"].get("arguments") or "" for part in parts)
    function = {"name": named["function"]["name"], "arguments": arguments}
    return {"id": named["id"], "type": "function", "function": function}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each under its own name; comments are left out."""
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.strip("\n").split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            value = json.loads(data.removeprefix("data: "))
            assert name == f"event: {value['type']}"
            found.append(value)
    return found
