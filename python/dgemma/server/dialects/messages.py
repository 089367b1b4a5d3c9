"""Anthropic's messages API: requests as chat completions, chunks as its blocks and events."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..engine import JsonObject
from ..failures import BadRequestError, Failure

_OWN = frozenset((
    *("system", "messages", "tools", "tool_choice", "thinking", "stop_sequences", "metadata"),
    *("model", "stream", "betas", "context_management"),
    *("output_config", "drafts", "anthropic_version", "inference_geo"),
))  # fmt: skip
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Of Claude Code's, for who sends the bill: it changes between versions and says nothing to a model.
_BILLING = "x-anthropic-billing-header:"
SIGNATURE = "dgemma"  # of thoughts: clients send it back, and nobody checks it
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


def error_form(told: Failure) -> JsonObject:
    """An error as Anthropic's clients read it."""
    kind = _ERRORS.get(told.status, "api_error" if told.status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": told.message, "param": told.param, "code": told.code}
    return {"type": "error", "error": {**error, **told.more}}


def chat_fields(body: Mapping[str, Any]) -> JsonObject:
    """The fields of a chat request that asks the same."""
    _refuse_to_continue(body.get("thread"))
    fields: JsonObject = {name: value for name, value in body.items() if name not in _OWN}
    fields.pop("n", None)  # an answer is one message here
    messages = list(_messages(body["messages"]))
    if system := _text(_unbilled(body.get("system"))):
        messages.insert(0, {"role": "system", "content": system})
    fields["messages"] = messages
    if body.get("stop_sequences"):
        fields["stop"] = body["stop_sequences"]
    if body.get("tools"):
        fields["tools"] = [_tool(tool) for tool in body["tools"]]
        choice = body.get("tool_choice")
        if choice is not None:
            fields["tool_choice"] = choice
    thinking = body.get("thinking")
    if isinstance(thinking, Mapping):
        enabled = thinking.get("type") in ("enabled", "adaptive")
        fields["chat_template_kwargs"] = {"enable_thinking": enabled}
    form = (body.get("output_config") or {}).get("format") or body.get("output_format")
    fields.pop("output_format", None)
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        schema = {"name": "answer", "schema": form.get("schema")}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _unbilled(system: Any) -> Any:
    if not isinstance(system, list):
        return system
    return [block for block in system if not _text(block).startswith(_BILLING)]


def _refuse_to_continue(thread: Any) -> None:
    """Refuses a request that has only what is new, in the words at which clients send the whole."""
    if isinstance(thread, Mapping) and thread.get("type") != "create":
        raise BadRequestError(
            "thread cannot be continued: answers are not kept here. Send the whole conversation "
            "as `messages`",
            404,
            param="thread",
            code="thread_not_found",
            more={"details": {"error_code": "thread_not_found"}},
        )


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or "input_schema" not in tool:
        return tool
    described = {n: tool[n] for n in ("name", "description") if n in tool}
    return {"type": "function", "function": {**described, "parameters": tool["input_schema"]}}


def _messages(messages: Sequence[Any]) -> Iterator[JsonObject]:
    for message in messages:
        content = message.get("content")
        role = message.get("role")
        if content is None or isinstance(content, str):
            yield {"role": role, "content": content}
        elif isinstance(content, Sequence):
            yield from _blocks(role, content)
        else:
            raise BadRequestError(
                "content must be a text or a list of blocks", param="messages", code="invalid_type"
            )


def _blocks(role: Any, blocks: Sequence[Any]) -> Iterator[JsonObject]:
    """One message, behind the results of tools that stand in it."""
    parts: list[Any] = []
    calls: list[JsonObject] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            content = _text(block.get("content"))
            if block.get("is_error"):
                content = f"Error: {content}"
            id = block.get("tool_use_id")
            yield {"role": "tool", "tool_call_id": id, "content": content}
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": "data:"}})
        elif kind in ("thinking", "redacted_thinking"):
            continue  # thoughts of earlier turns are not shown to the model again
        elif kind == "document":
            parts.append(_document(block))
        elif kind == "search_result":
            parts.append({"type": "text", "text": _titled(block, _text(block.get("content")))})
        else:
            parts.append(block)
    if parts or calls or not blocks:
        yield {"role": role, "content": parts or None, **({"tool_calls": calls} if calls else {})}


def _document(block: Mapping[str, Any]) -> JsonObject:
    """A document as a part: of text, or one that nobody here can read."""
    source = block.get("source")
    source = source if isinstance(source, Mapping) else {}
    if source.get("type") == "text" and isinstance(source.get("data"), str):
        return {"type": "text", "text": _titled(block, source["data"])}
    if source.get("type") == "content":
        return {"type": "text", "text": _titled(block, _text(source.get("content")))}
    return {"type": "document"}


def _titled(block: Mapping[str, Any], text: str) -> str:
    title = block.get("title")
    return f"{title}\n\n{text}" if isinstance(title, str) else text


def _text(content: Any) -> str:
    """The text of a text or of a list of blocks."""
    if content is None or isinstance(content, str):
        return content or ""
    blocks = content if isinstance(content, Sequence) else [content]
    texts = [b.get("text") for b in blocks if isinstance(b, Mapping) and b.get("type") == "text"]
    return "\n\n".join(text for text in texts if isinstance(text, str))


class MessageWriter:
    """An answer as blocks, and the events that tell of them as they come."""

    def __init__(self, model: str) -> None:
        self._open: JsonObject | None = None
        self.message: JsonObject = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }

    def begin(self) -> JsonObject:
        """The first event."""
        return {"type": "message_start", "message": {**self.message, "content": []}}

    @property
    def _index(self) -> int:
        return len(self.message["content"])

    def feed(self, delta: Mapping[str, Any]) -> Iterator[JsonObject]:
        """The events of a chunk's delta, or of a whole message."""
        if text := delta.get("reasoning_content"):
            yield from self._more("thinking", text)
        if text := delta.get("content"):
            yield from self._more("text", text)
        for call in delta.get("tool_calls") or []:
            yield from self._close()
            function = call["function"]
            block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
            yield self._start(block)
            arguments = {"type": "input_json_delta", "partial_json": function["arguments"]}
            yield self._delta(arguments)
            block["input"] = json.loads(function["arguments"])
            yield from self._close()

    def _start(self, block: JsonObject) -> JsonObject:
        self._open = block
        return {
            "type": "content_block_start", "index": self._index, "content_block": dict(block)
        }  # fmt: skip

    def _delta(self, delta: JsonObject) -> JsonObject:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _more(self, kind: str, text: str) -> Iterator[JsonObject]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            signed = {"signature": ""} if kind == "thinking" else {}
            yield self._start({"type": kind, kind: "", **signed})
        assert self._open is not None
        self._open[kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _close(self) -> Iterator[JsonObject]:
        if self._open is None:
            return
        if self._open["type"] == "thinking":
            self._open["signature"] = SIGNATURE
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        yield {"type": "content_block_stop", "index": self._index}
        self.message["content"].append(self._open)
        self._open = None

    def finish(
        self, reason: str | None, usage: Mapping[str, Any], stopped_by: str | None = None
    ) -> Iterator[JsonObject]:
        """The last events; afterwards `message` is whole."""
        yield from self._close()
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        counts = {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage["completion_tokens"],
        }
        ended = {"stop_reason": _REASONS.get(reason or "stop", "end_turn"), "stop_sequence": None}
        if stopped_by is not None and ended["stop_reason"] == "end_turn":
            ended = {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
        self.message |= {**ended, "usage": counts}
        yield {"type": "message_delta", "delta": ended, "usage": counts}
        yield {"type": "message_stop"}
