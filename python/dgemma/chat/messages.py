"""Conversations in the form that templates read: what other programs send, checked and completed.

A conversation that was once accepted can always be sent again. So what a model or a client left
behind in it is mended: calls that were cut off, responses whose call was trimmed, parts that are no
text. Only what the model is to answer now must be something that it can read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionTypeError, OptionValueError
from ..tools.reader import MAX_DEPTH, depth, read_object

Message = Mapping[str, Any]
# Names of other programs on the left.
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "model": "assistant", "ai": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_content")
_NO_NAME = "unknown"


def normalized(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked copies of messages, in the form that Gemma 4's template reads.

    Arguments of calls become objects. The model answers in the turn in which it called a tool, so
    the `tool` messages after a call become `tool_responses` of the message that made it, and the
    answer that follows becomes that message's text. A response whose call is not there gets one.
    Several system messages at the beginning become one, as models know it.

    Errors: OptionTypeError and OptionValueError, with the place in `param`.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise OptionTypeError(
            "messages must be a list of {'role': …, 'content': …}", param="messages"
        )
    if not messages:
        raise OptionValueError("messages must have at least one message", param="messages")
    answered = [i for i, message in enumerate(messages) if _role(message) == "assistant"]
    made = _Conversation()
    for index, message in enumerate(messages):
        old = bool(answered) and index < answered[-1]
        made.add(_message(message, f"messages[{index}]", old=old))
    return made.found


def prefilled(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], str]:
    """Normalised messages, and the beginning of an answer that the last of them is to continue."""
    found = normalized(messages)
    last = found[-1]
    begun = str(last["content"]) if _role(messages[-1]) == "assistant" else ""
    if not begun or last["role"] != "assistant":
        return found, ""
    if last.get("tool_responses"):
        last["content"] = ""
    elif last.get("tool_calls"):
        return found, ""
    else:
        found.pop()
    return found or [{"role": "user", "content": ""}], begun


def instructed(messages: Sequence[Message], instruction: str) -> Sequence[Message]:
    """The messages with an instruction behind their system message, or as one."""
    if not instruction or not isinstance(messages, Sequence) or not messages:
        return messages
    first = messages[0]
    if not isinstance(first, Mapping) or first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": instruction}, *messages]
    said = _text(first.get("content"), "messages[0]", "system")
    content = "\n\n".join(filter(None, [said, instruction]))
    return [{**first, "content": content}, *messages[1:]]


class _Conversation:
    """Messages so far, and which of them made which call."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._callers: dict[str, tuple[dict[str, Any], str]] = {}  # of the calls, by id

    def add(self, message: dict[str, Any]) -> None:
        if message["role"] == "tool":
            self._respond(message)
            return
        if message["role"] == "system" and [m["role"] for m in self.found] == ["system"]:
            texts = (self.found[0]["content"], message["content"])
            self.found[0]["content"] = "\n\n".join(filter(None, texts))
            return
        for call in message.get("tool_calls", ()):
            if call.get("id") is not None:
                self._callers[str(call["id"])] = (message, call["function"]["name"])
        caller = self._last_caller()
        goes_on = (
            message["role"] == "assistant"
            and caller is not None
            and caller.get("tool_responses")
            and not caller["content"]
            and not message.get("tool_calls")
        )
        if goes_on and caller is not None:
            caller["content"] = message["content"]
        else:
            self.found.append(message)

    def _last_caller(self) -> dict[str, Any] | None:
        last = self.found[-1] if self.found else {}
        return last if last.get("tool_calls") else None

    def _respond(self, message: dict[str, Any]) -> None:
        caller, name = self._callers.get(str(message.get("tool_call_id")), (None, None))
        caller = caller or self._last_caller()
        name = message.get("name") or name
        if caller is None:  # its call was trimmed
            call = {"function": {"name": str(name or _NO_NAME), "arguments": {}}}
            caller = {"role": "assistant", "content": "", "tool_calls": [call]}
            self.found.append(caller)
        responses = caller.setdefault("tool_responses", [])
        if name is None:  # by their order, as some clients leave out both names and ids
            calls = caller["tool_calls"]
            name = calls[min(len(responses), len(calls) - 1)]["function"]["name"]
        responses.append({"name": str(name), "response": _response(message["content"])})


def _role(message: Any) -> str | None:
    role = message.get("role") if isinstance(message, Mapping) else None
    return _ROLES.get(role.lower()) if isinstance(role, str) else None


def _message(message: Any, place: str, *, old: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise OptionTypeError(
            f"{place} must be an object, not a {type(message).__name__}", param=place
        )
    role = _role(message)
    if role is None:
        known = ", ".join(("system", "developer", "user", "assistant", "tool"))
        raise OptionValueError(
            f"{place}.role is {message.get('role')!r}: expected one of {known}",
            param=f"{place}.role",
        )
    checked = {name: value for name, value in message.items() if value is not None}
    checked["role"] = role
    # What a tool shows is noted: the model can say that it does not see it.
    checked["content"] = _text(message.get("content"), place, "" if old else role)
    if role == "assistant" and not checked["content"] and message.get("refusal"):
        checked["content"] = str(message["refusal"])
    calls = message.get("tool_calls") or []
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise OptionTypeError(f"{place}.tool_calls must be a list", param=f"{place}.tool_calls")
    if message.get("function_call"):  # as the API had it before tools
        calls = [*calls, {"function": message["function_call"]}]
    for name in ("tool_calls", "function_call", "tool_responses"):
        checked.pop(name, None)
    if calls and role == "assistant":
        checked["tool_calls"] = [
            _call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return checked


def _text(content: Any, place: str, role: str) -> str:
    """The text of a content; `role` "": of an old turn, in which what is no text is noted."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise OptionTypeError(
            f"{place}.content must be a text or a list of parts", param=f"{place}.content"
        )
    return "".join(_part(part, f"{place}.content[{i}]", role) for i, part in enumerate(content))


def _part(part: Any, place: str, role: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise OptionTypeError(
            f"{place}: the content has a part that is no {{'type': …}} object", param=place
        )
    if kind in _TEXTS:
        text = part.get(_TEXTS[kind])
        return "" if text is None else str(text)
    if kind in _THOUGHTS:
        return ""
    if role in ("user", "system"):
        raise OptionValueError(
            f"{place}: the content has a part of type {kind!r}: "
            "this engine reads text only, the vision part of the model is left out",
            param=place,
            code="unsupported_content",
        )
    return f"[{kind} left out]"


def _call(call: Any, place: str) -> dict[str, Any]:
    call = dict(call) if isinstance(call, Mapping) else {}
    function = call.get("function")
    if isinstance(call.get("custom"), Mapping):
        custom = call["custom"]
        function = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise OptionTypeError(
            f"{place} must be {{'function': {{'name': …, 'arguments': …}}}}: tool_calls",
            param=f"{place}.function.name",
        )
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    elif isinstance(arguments, str):
        arguments = read_object(arguments)
    elif not isinstance(arguments, Mapping) or depth(arguments) > MAX_DEPTH:
        arguments = {"value": arguments if depth(arguments) <= MAX_DEPTH else _source(arguments)}
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _source(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return "…"


def _response(content: str) -> Any:
    """An object where a tool answered with one: the template writes its fields out."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return value if isinstance(value, dict) and depth(value) <= MAX_DEPTH else content
