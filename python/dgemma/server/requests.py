"""From a body's fields to what the engine is asked: names of other programs, tools, thinking."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..compat.requests import ChatOptions, CompletionOptions, accept
from .engine import JsonObject
from .failures import BadRequestError
from .wishes import asked_form, asked_to_think

# Fields that ask for nothing which an answer would show: notes of the client's own, hints for
# caches and bills, fields whose only value here is the one that is done anyway.
_NOTES = frozenset((
    *("model", "stream", "drafts", "user", "metadata", "store", "service_tier", "verbosity"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction"),
    *("keep_alive", "cache_prompt", "id_slot", "slot_id", "session_id", "n_keep", "include"),
    *("modalities", "truncation", "client_metadata", "cache_control", "timings_per_token"),
    *("return_tokens", "return_progress", "post_sampling_probs", "t_max_predict_ms", "n_indent"),
    *("add_generation_prompt", "skip_special_tokens", "spaces_between_special_tokens"),
    *("background", "extra_body", "continue_final_message"),
))  # fmt: skip
# Other names of the same option.
_RENAMED = {
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "random_seed": "seed",
    "stop_sequences": "stop",
}
_NAME = re.compile(r"[^\s{}<>\"|:]{1,256}\Z")
MAX_TOOLS = 256


def chat_options(
    given: Mapping[str, Any], *, strict: bool, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The arguments of `ChatCompletion`, `messages` included, of the fields of a request.

    `notes`: sentences about what was left out of it already. Errors: OptionError and
    BadRequestError, which name the field.
    """
    fields = _plain(given)
    if strict and notes:
        raise BadRequestError(notes[0], code="unsupported_value")
    if "tools" in fields:
        fields["tools"], more = function_tools(fields["tools"], strict=strict)
        notes = [*more, *notes]
        if not fields["tools"]:
            del fields["tools"]
    if "tool_choice" in fields:
        fields["tool_choice"] = tool_choice(fields["tool_choice"])
    wanted = asked_to_think(fields)
    template = fields.get("chat_template_kwargs")
    thinking(template)  # an object, where it is given
    if wanted is not None and "enable_thinking" not in (template or {}):
        fields.setdefault("enable_thinking", wanted)
    return _accepted(fields, ChatOptions, "messages", notes, strict)


def completion_options(given: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """The arguments of `Completion`, `prompt` included, of the fields of a request."""
    return _accepted(_plain(given), CompletionOptions, "prompt", [], strict)


def thinking(template: Any) -> bool:
    """Whether the fields for the template ask for a thought."""
    if template is not None and not isinstance(template, Mapping):
        raise BadRequestError(
            "chat_template_kwargs must be an object",
            param="chat_template_kwargs",
            code="invalid_type",
        )
    return bool((template or {}).get("enable_thinking", False))


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something, under one name each."""
    fields = {n: v for n, v in given.items() if v is not None and n not in _NOTES}
    for other, name in _RENAMED.items():
        if other in fields:
            value = fields.pop(other)
            fields.setdefault(name, value)
    form = asked_form(fields)
    if form is not None:
        fields["response_format"] = form
    return fields


def _accepted(
    fields: dict[str, Any], kind: type[Any], also: str, notes: Sequence[str], strict: bool
) -> dict[str, Any]:
    accepted = accept(fields, kind, strict=strict, unknown="ignore", also=(also,))
    return {**accepted.options, "warnings": (*notes, *accepted.warnings)}


def function_tools(tools: Any, *, strict: bool) -> tuple[list[JsonObject], list[str]]:
    """The tools that are functions, in the form of chat completions, and notes about the others.

    A function may stand in `function` or, as in the responses API, in the tool itself.
    """
    found, notes = [], []
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise BadRequestError("tools must be a list", param="tools", code="invalid_type")
    if len(tools) > MAX_TOOLS:
        raise BadRequestError(f"tools has {len(tools)} entries: at most {MAX_TOOLS}", param="tools")
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise BadRequestError(f"{place} must be an object", param=place, code="invalid_type")
        kind = tool.get("type", "function")
        if kind != "function" and not isinstance(tool.get("function"), Mapping):
            told = f"{place} is a tool of type {kind!r}: only functions can be called here"
            if strict:
                raise BadRequestError(told, param=place, code="unsupported_value")
            notes.append(told)
            continue
        found.append({"type": "function", "function": _function(tool.get("function", tool), place)})
    return found, notes


def _function(function: Any, place: str) -> JsonObject:
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.match(name):
        raise BadRequestError(
            f"{place}.function.name is {name!r}: expected a name without spaces and braces",
            param=f"{place}.function.name",
        )
    made: JsonObject = {"name": name}
    if isinstance(description := function.get("description"), str):
        made["description"] = description
    parameters = function.get("parameters")
    if parameters is not None:
        if not isinstance(parameters, Mapping):
            raise BadRequestError(
                f"{place}.function.parameters must be a JSON schema, an object",
                param=f"{place}.function.parameters",
                code="invalid_type",
            )
        made["parameters"] = dict(parameters)
    return made


def tool_choice(choice: Any) -> str | JsonObject:
    """A tool choice in the form of chat completions, from whichever API it comes."""
    if isinstance(choice, str):
        known = {"any": "required"}.get(choice, choice)
        if known in ("auto", "none", "required"):
            return known
    elif isinstance(choice, Mapping):
        kind = choice.get("type")
        if kind in ("auto", "none", "any", "required"):
            return "required" if kind == "any" else str(kind)
        if kind == "allowed_tools":
            inner = choice.get("allowed_tools", choice)
            if isinstance(inner, Mapping) and inner.get("mode") in ("auto", "required"):
                allowed = {name: inner[name] for name in ("mode", "tools") if name in inner}
                return {"type": "allowed_tools", "allowed_tools": allowed}
        function = choice.get("function")
        name = (function if isinstance(function, Mapping) else choice).get("name")
        if isinstance(name, str):
            return {"type": "function", "function": {"name": name}}
    raise BadRequestError(
        f"tool_choice is {str(choice)[:200]!r}: expected 'auto', 'none', 'required', or "
        "{'type': 'function', 'function': {'name': …}}",
        param="tool_choice",
    )
