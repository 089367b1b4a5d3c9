"""OpenAI's responses API: a request as a chat request that asks the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..engine import JsonObject
from ..failures import BadRequestError
from .response_tools import Called, chat_call, chat_tools

_TEXTS = ("input_text", "output_text", "text", "summary_text", "refusal", "reasoning_text")
# Fields that mean the same in both APIs.
_SAME = (
    *("temperature", "top_p", "tool_choice", "parallel_tool_calls", "seed", "stop"),
    *("max_denoising_steps", "t_min", "t_max", "entropy_bound", "stability_threshold"),
    *("confidence_threshold", "chat_template_kwargs", "top_logprobs"),
)
_OWN = frozenset((
    *("input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "model"),
    *("stream", "previous_response_id", "conversation", "prompt", "drafts", "max_tool_calls"),
))  # fmt: skip


class Past(Protocol):
    """What is known of earlier answers."""

    def conversation(self, id: str) -> list[JsonObject] | None:
        """All items up to the end of a response; None where it is not known."""

    def item(self, id: str) -> JsonObject | None:
        """One item of any of them."""


@dataclass(frozen=True)
class Asked:
    """What a request asks.

    `fields`: of a chat request. `items`: what is new of the conversation. `called`: the tools, by
    the names by which the model calls them. `notes`: sentences about what was left out.
    """

    fields: JsonObject
    items: list[JsonObject]
    called: Mapping[str, Called]
    notes: tuple[str, ...] = ()


def asked(body: Mapping[str, Any], past: Past) -> Asked:
    """What the fields of a request ask; BadRequestError names the one to blame."""
    for name in ("conversation", "prompt"):
        if body.get(name):
            raise BadRequestError(
                f"{name} is not supported: conversations are kept as responses here. Name the "
                "last one as `previous_response_id`, or send all items as `input`",
                param=name,
                code="unsupported_parameter",
            )
    if any("logprobs" in str(wanted) for wanted in body.get("include") or ()):
        raise BadRequestError(
            "include asks for log-probabilities: a settled canvas has no probability per token in "
            "order",
            param="include",
            code="unsupported_parameter",
        )
    tools, called = chat_tools(body.get("tools") or [])
    fields: JsonObject = {name: value for name, value in body.items() if name not in _OWN}
    fields |= {name: body[name] for name in _SAME if body.get(name) is not None}
    items = [_resolved(item, f"input[{i}]", past) for i, item in enumerate(_items(body))]
    notes = ["n is not known here and was ignored"] if fields.pop("n", 1) != 1 else []
    fields["messages"] = [
        *_instructions(body.get("instructions")),
        *_messages([*_before(body.get("previous_response_id"), past), *items], notes),
    ]
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
    return Asked(fields, items, called, tuple(notes))


def _before(id: Any, past: Past) -> list[JsonObject]:
    """The items of the conversation that a response ended."""
    if not id:
        return []
    found = past.conversation(id) if isinstance(id, str) else None
    if found is None:
        raise BadRequestError(
            f"there is no response {str(id)[:100]!r} here: it was asked with `store` false, is too "
            "old, or was made by another server. Send the whole conversation as `input`",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return found


def _items(body: Mapping[str, Any]) -> list[Any]:
    given = body.get("input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, Sequence):
        raise BadRequestError(
            "input must be a text or a list of items",
            param="input",
            code="missing_required_parameter" if given is None else "invalid_type",
        )
    return list(given)


def _resolved(item: Any, place: str, past: Past) -> JsonObject:
    """An item, where only its id was sent."""
    if not isinstance(item, Mapping):
        raise BadRequestError(f"{place} must be an object", param=place, code="invalid_type")
    if item.get("type") != "item_reference" and set(item) - {"id"}:
        return dict(item)
    id = str(item.get("id"))
    found = past.item(id)
    if found is None and id.startswith("rs_"):
        return {"type": "reasoning", "id": id, "summary": []}
    if found is None:
        raise BadRequestError(
            f"{place} refers to an item that is not known here: it was made with `store` false, is "
            "too old, or is another server's. Send the item itself",
            param=place,
            code="unsupported_value",
        )
    return found


def _instructions(text: Any) -> list[JsonObject]:
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _messages(items: Sequence[Mapping[str, Any]], notes: list[str]) -> list[JsonObject]:
    messages: list[JsonObject] = []
    for index, item in enumerate(items):
        kind = item.get("type") or "message"
        if kind == "message":
            content = item.get("content")
            parts = content if isinstance(content, str) or content is None else _parts(content)
            messages.append({"role": item.get("role"), "content": parts})
        elif not isinstance(kind, str) or not _add_call(messages, kind, item):
            notes.append(f"input[{index}] is an item of type {str(kind)[:60]!r} and was left out")
    return messages


def _add_call(messages: list[JsonObject], kind: str, item: Mapping[str, Any]) -> bool:
    """Adds an earlier call or its result; whether the item was one, or a thought.

    Thoughts of earlier turns are not shown to the model again.
    """
    if kind.endswith("_call_output"):
        output = item.get("output")
        text = output if isinstance(output, str) else _parts(output or [])
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    elif kind.endswith("_call") and (item.get("call_id") is not None or item.get("name")):
        call = chat_call(item)
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        if kind == "mcp_call":  # which has its result with it
            said = item.get("output") or item.get("error") or ""
            text = said if isinstance(said, str) else str(said)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
    else:
        return kind == "reasoning"
    return True


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
