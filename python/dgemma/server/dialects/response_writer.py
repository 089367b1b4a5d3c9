"""An answer in the form of OpenAI's responses API: items, and the events that tell of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..engine import JsonObject
from .response_tools import Called, free_text


class ResponseWriter:
    """An answer as items, and the events that tell of them as they come."""

    def __init__(
        self, body: Mapping[str, Any], model: str, called: Mapping[str, Called], *, stored: bool
    ) -> None:
        self._called, self._n = called, 0
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
            "previous_response_id": body.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None, **(body.get("reasoning") or {})},
            "store": stored,
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
        called = self._called.get(function["name"]) or Called(function["name"])
        custom = called.custom
        field = "input" if custom else "arguments"
        value = free_text(function["arguments"]) if custom else function["arguments"]
        item = {
            "id": f"{'ctc' if custom else 'fc'}_{secrets.token_hex(16)}",
            "type": "custom_tool_call" if custom else "function_call",
            "status": "completed",
            "call_id": call["id"],
            "name": called.name,
            field: value,
        }
        if called.namespace is not None:
            item["namespace"] = called.namespace
        begun = {**item, "status": "in_progress", field: ""}
        yield self._event("output_item.added", output_index=index, item=begun)
        name = "custom_tool_call_input" if custom else "function_call_arguments"
        place = {"item_id": item["id"], "output_index": index}
        yield self._event(f"{name}.delta", **place, delta=value)
        told = {field: value} if custom else {field: value, "name": called.name}
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
