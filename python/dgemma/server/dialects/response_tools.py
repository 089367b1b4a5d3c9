"""The tools of OpenAI's responses API: functions, free-form tools, and functions in a namespace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import JsonObject


@dataclass(frozen=True)
class Called:
    """A tool as its program knows it. `custom`: a free-form one, which takes a text as `input`."""

    name: str
    namespace: str | None = None
    custom: bool = False


def chat_tools(tools: Sequence[Any]) -> tuple[list[Any], dict[str, Called]]:
    """Tools as chat completions have them, and which tool a call of each name means."""
    found: list[Any] = []
    called: dict[str, Called] = {}
    for tool in tools:
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind == "namespace" and isinstance(tool.get("tools"), list):
            for inner in tool["tools"]:
                found.append(_declared(inner, called, str(tool.get("name"))))
        else:
            found.append(_declared(tool, called, None))
    return found, called


def _declared(tool: Any, called: dict[str, Called], namespace: str | None) -> Any:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
        return tool
    name = full_name(tool["name"], namespace)
    custom = tool.get("type") == "custom"
    called[name] = Called(tool["name"], namespace, custom)
    if not custom:
        return {**tool, "name": name}
    text = {"type": "string", "description": "the whole text"}
    parameters = {"type": "object", "properties": {"input": text}, "required": ["input"]}
    described = {n: tool[n] for n in ("description",) if n in tool}
    function = {"name": name, **described, "parameters": parameters}
    return {"type": "function", "function": function}


def full_name(name: Any, namespace: Any) -> Any:
    """The name by which the model calls a tool: its namespace's before its own."""
    return f"{namespace}.{name}" if isinstance(namespace, str) and namespace else name


def chat_call(item: Mapping[str, Any]) -> JsonObject:
    """An earlier call of any kind as chat completions have it."""
    kind = str(item["type"])
    name = item.get("name") or kind.removesuffix("_call")
    arguments = item.get("arguments")
    if kind == "custom_tool_call":
        arguments = json.dumps({"input": item.get("input") or ""}, ensure_ascii=False)
    elif arguments is None:  # of a tool of OpenAI's own: a shell, a patch
        arguments = next((item[n] for n in ("action", "operation", "input") if n in item), {})
    function = {"name": full_name(name, item.get("namespace")), "arguments": arguments}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def free_text(arguments: str) -> str:
    """The text that a call of a free-form tool gives."""
    try:
        given = json.loads(arguments)
    except ValueError:
        return arguments
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else arguments
