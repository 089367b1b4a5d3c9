"""OpenAI's responses API: requests as chat completions, chunks as its items and events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..engine import JsonObject
from ..failures import BadRequestError

_TEXTS = ("input_text", "output_text", "text", "summary_text", "refusal", "reasoning_text")
# Fields that mean the same in both APIs.
_SAME = (
    *("temperature", "top_p", "tool_choice", "parallel_tool_calls", "seed", "stop", "n"),
    *("max_denoising_steps", "t_min", "t_max", "entropy_bound", "stability_threshold"),
    *("confidence_threshold", "chat_template_kwargs", "top_logprobs"),
)
_OWN = frozenset((
    *("input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "model"),
    *("stream", "previous_response_id", "conversation", "prompt", "drafts", "max_tool_calls"),
))  # fmt: skip


def chat_fields(body: Mapping[str, Any]) -> tuple[JsonObject, frozenset[str]]:
    """The fields of a chat request that asks the same, and the names of free-form tools."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if body.get(name):
            raise BadRequestError(
                f"{name} is not supported: answers are not kept here. Send the whole "
                "conversation as `input`",
                param=name,
                code="unsupported_parameter",
            )
    tools, custom = _tools(body.get("tools") or [])
    fields: JsonObject = {name: value for name, value in body.items() if name not in _OWN}
    fields |= {name: body[name] for name in _SAME if body.get(name) is not None}
    fields["messages"] = _messages(body.get("instructions"), body.get("input"))
    if tools:
        fields["tools"] = tools
    if body.get("max_output_tokens") is not None:
        fields["max_tokens"] = body["max_output_tokens"]
    effort = (body.get("reasoning") or {}).get("effort")
    if effort is not None:
        fields["reasoning_effort"] = effort
    form = (body.get("text") or {}).get("format")
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        fields["response_format"] = {"type": "json_schema", "json_schema": dict(form)}
    elif form is not None:
        fields["response_format"] = form
    return fields, custom


def _tools(tools: Sequence[Any]) -> tuple[list[Any], frozenset[str]]:
    """Tools as chat completions have them; a free-form one takes its text as `input`."""
    found, custom = [], set()
    for tool in tools:
        if isinstance(tool, Mapping) and tool.get("type") == "custom":
            custom.add(str(tool.get("name")))
            text = {"type": "string", "description": "the whole text"}
            parameters = {"type": "object", "properties": {"input": text}, "required": ["input"]}
            described = {n: tool[n] for n in ("name", "description") if n in tool}
            tool = {"type": "function", "function": {**described, "parameters": parameters}}
        found.append(tool)
    return found, frozenset(custom)


def _messages(instructions: Any, given: Any) -> list[JsonObject]:
    messages: list[JsonObject] = []
    if isinstance(instructions, str) and instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, Sequence):
        raise BadRequestError(
            "input must be a text or a list of items",
            param="input",
            code="missing_required_parameter" if given is None else "invalid_type",
        )
    for index, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise BadRequestError(
                f"input[{index}] must be an object", param=f"input[{index}]", code="invalid_type"
            )
        if item.get("type") == "item_reference" and not str(item.get("id")).startswith("rs_"):
            raise BadRequestError(
                f"input[{index}] refers to an item of an earlier answer: answers are not kept "
                "here. Send the item itself, as clients do with `store` false",
                param=f"input[{index}]",
                code="unsupported_value",
            )
        _add_item(messages, item)
    return messages


def _add_item(messages: list[JsonObject], item: Mapping[str, Any]) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        parts = content if isinstance(content, str) or content is None else _parts(content)
        messages.append({"role": item.get("role"), "content": parts})
    elif kind in ("function_call", "custom_tool_call"):
        arguments = item.get("arguments")
        if kind == "custom_tool_call":
            arguments = json.dumps({"input": item.get("input") or ""}, ensure_ascii=False)
        function = {"name": item.get("name"), "arguments": arguments}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind in ("function_call_output", "custom_tool_call_output"):
        output = item.get("output")
        text = output if isinstance(output, str) else _parts(output or [])
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    # Thoughts of earlier turns, searches and the like are not shown to the model again.


def _parts(content: Any) -> list[Any]:
    if not isinstance(content, Sequence):
        content = [content]
    found: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXTS:
            text = part.get("text", part.get("refusal"))
            found.append({"type": "text", "text": text or ""})
        elif kind == "input_image":
            found.append({"type": "image_url", "image_url": {"url": part.get("image_url")}})
        else:
            found.append({"type": "text", "text": part} if isinstance(part, str) else part)
    return found


class ResponseWriter:
    """An answer as items, and the events that tell of them as they come."""

    def __init__(self, body: Mapping[str, Any], model: str, custom: frozenset[str]) -> None:
        self._custom, self._n = custom, 0
        self._open: JsonObject | None = None  # the item under way
        self._text = ""
        self.response: JsonObject = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **(body.get("reasoning") or {})},
            "store": False,
            "temperature": body.get("temperature"),
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p"),
            "truncation": "disabled",
            "usage": None,
            "user": body.get("user"),
        }

    def _event(self, kind: str, **fields: Any) -> JsonObject:
        self._n += 1
        return {"type": f"response.{kind}", "sequence_number": self._n - 1, **fields}

    def begin(self) -> list[JsonObject]:
        """The events before there is anything."""
        shown = {**self.response, "output": []}
        return [self._event("created", response=shown), self._event("in_progress", response=shown)]

    def feed(self, delta: Mapping[str, Any]) -> Iterator[JsonObject]:
        """The events of a chunk's delta, or of a whole message."""
        if text := delta.get("reasoning_content"):
            yield from self._more("reasoning", text)
        if text := delta.get("content"):
            yield from self._more("message", text)
        for call in delta.get("tool_calls") or []:
            yield from self._call(call)

    def _more(self, kind: str, text: str) -> Iterator[JsonObject]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._begin_text(kind)
        self._text += text
        name = "output_text" if kind == "message" else "reasoning_text"
        yield self._event(f"{name}.delta", **self._place(), delta=text, **self._no_logprobs(kind))

    def _place(self) -> JsonObject:
        assert self._open is not None
        index = len(self.response["output"])
        return {"item_id": self._open["id"], "output_index": index, "content_index": 0}

    @staticmethod
    def _no_logprobs(kind: str) -> JsonObject:
        return {"logprobs": []} if kind == "message" else {}

    def _begin_text(self, kind: str) -> Iterator[JsonObject]:
        self._text = ""
        self._open = {
            "id": f"{'msg' if kind == 'message' else 'rs'}_{secrets.token_hex(16)}",
            "type": kind,
            "status": "in_progress",
        }
        self._open |= {"role": "assistant", "content": []} if kind == "message" else {"summary": []}
        index = len(self.response["output"])
        yield self._event("output_item.added", output_index=index, item=dict(self._open))
        yield self._event("content_part.added", **self._place(), part=self._part(kind))

    def _part(self, kind: str) -> JsonObject:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _close(self, status: str = "completed") -> Iterator[JsonObject]:
        if self._open is None:
            return
        kind, item = self._open["type"], self._open
        name = "output_text" if kind == "message" else "reasoning_text"
        place, part = self._place(), self._part(kind)
        yield self._event(f"{name}.done", **place, text=self._text, **self._no_logprobs(kind))
        yield self._event("content_part.done", **place, part=part)
        item |= {"status": status, "content": [part]}
        yield self._event("output_item.done", output_index=place["output_index"], item=item)
        self.response["output"].append(item)
        self._open = None

    def _call(self, call: Mapping[str, Any]) -> Iterator[JsonObject]:
        yield from self._close()
        function, index = call["function"], len(self.response["output"])
        custom = function["name"] in self._custom
        field = "input" if custom else "arguments"
        value = _free_text(function["arguments"]) if custom else function["arguments"]
        item = {
            "id": f"{'ctc' if custom else 'fc'}_{secrets.token_hex(16)}",
            "type": "custom_tool_call" if custom else "function_call",
            "status": "completed",
            "call_id": call["id"],
            "name": function["name"],
            field: value,
        }
        begun = {**item, "status": "in_progress", field: ""}
        yield self._event("output_item.added", output_index=index, item=begun)
        name = "custom_tool_call_input" if custom else "function_call_arguments"
        place = {"item_id": item["id"], "output_index": index}
        yield self._event(f"{name}.delta", **place, delta=value)
        told = {field: value} if custom else {field: value, "name": function["name"]}
        yield self._event(f"{name}.done", **place, **told)
        yield self._event("output_item.done", output_index=index, item=item)
        self.response["output"].append(item)

    def finish(self, reason: str | None, usage: Mapping[str, Any]) -> Iterator[JsonObject]:
        """The last events; afterwards `response` is whole."""
        cut = reason == "length"
        yield from self._close("incomplete" if cut else "completed")
        self.response["status"] = "incomplete" if cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        yield self._event("incomplete" if cut else "completed", response=self.response)

    def fail(self, code: str, message: str) -> JsonObject:
        """The last event where making the answer failed."""
        self.response |= {"status": "failed", "error": {"code": code, "message": message}}
        return self._event("failed", response=self.response)


def _free_text(arguments: str) -> str:
    try:
        given = json.loads(arguments)
    except ValueError:
        return arguments
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else arguments
