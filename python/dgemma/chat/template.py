"""Conversations as the model reads them: messages in the OpenAI form become one prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from ..errors import ChatTemplateError, ModelFileError
from ..marks import MarkedText
from ..tokenizer import control_tokens
from .sandbox import Template

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatTemplate:
    """The chat template of a file with these `keys`, or Gemma 4's where it has none.

    A file may have others by name: `tool_use` is for conversations with tools, `rag` for documents.
    """

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self._tokens = control_tokens(keys)
        self._plain = self._template(keys, "tokenizer.chat_template") or Template(
            resources.files(__package__).joinpath("gemma4.jinja").read_text("utf-8"), self._tokens
        )
        self._tools = self._template(keys, "tokenizer.chat_template.tool_use") or self._plain
        self._documents = self._template(keys, "tokenizer.chat_template.rag") or self._plain
        tokens = keys.get("tokenizer.ggml.tokens")
        self._variables = {
            f"{name}_token": tokens[id] if tokens and 0 <= id < len(tokens) else ""
            for name in ("bos", "eos")
            for id in [keys.get(f"tokenizer.ggml.{name}_token_id", -1)]
        }

    def _template(self, keys: Mapping[str, Any], name: str) -> Template | None:
        source = keys.get(name)
        if source is not None and not isinstance(source, str):
            raise ModelFileError(f"{name} is a {type(source).__name__}: expected a text")
        return Template(source, self._tokens) if source else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> MarkedText:
        """The prompt for these messages, begin token included.

        It reads as a text, and knows which control tokens the template wrote: those that messages,
        tools and documents spell out are encoded as ordinary text (see `Tokenizer.encode`).

        Errors: TypeError and ValueError where a message is malformed, ChatTemplateError where the
        template cannot express them.
        """
        template = self._tools if tools else self._documents if documents else self._plain
        return template.render(
            {
                "messages": normalized(messages),
                "tools": [_tool(tool) for tool in tools or []] or None,
                **({"documents": documents} if documents else {}),
            },
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )


def check_template(source: str, **keys: Any) -> None:
    """Raises ChatTemplateError where a template cannot be read, or cannot say the simplest thing.

    `keys`: metadata of the file that it is for, such as `tokenizer.ggml.tokens`.
    """
    template = ChatTemplate({**keys, "tokenizer.chat_template": source})
    greeting = [{"role": "user", "content": "Hi"}]
    if "Hi" not in template.render(greeting):
        raise ChatTemplateError("the chat template does not write what the user says")


def normalized(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked copies of messages, in the form that Gemma 4's template reads.

    Arguments of calls become objects. The model answers in the turn in which it called a tool, so
    the `tool` messages after a call become `tool_responses` of the message that made it, and the
    answer that follows becomes that message's text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError("messages must be a list of {'role': …, 'content': …}")
    if not messages:
        raise ValueError("messages must have at least one message")
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the calls, by id
    for index, message in enumerate(messages):
        checked = _message(message, f"messages[{index}]")
        caller = found[-1] if found and found[-1].get("tool_calls") else None
        for call in checked.get("tool_calls", ()):
            names[str(call.get("id"))] = call["function"]["name"]
        if checked["role"] == "tool":
            if caller is None:
                raise ValueError(f"messages[{index}] answers no call: none stands before it")
            name = checked.get("name") or names.get(str(checked.get("tool_call_id")))
            responses = caller.setdefault("tool_responses", [])
            if name is None:  # by their order, as some clients leave out both names and ids
                calls = caller["tool_calls"]
                name = calls[min(len(responses), len(calls) - 1)]["function"]["name"]
            responses.append({"name": name, "response": _response(checked["content"])})
        elif (
            checked["role"] == "assistant"
            and caller is not None
            and caller.get("tool_responses")
            and not caller["content"]
            and not checked.get("tool_calls")
        ):
            caller["content"] = checked["content"]
        else:
            found.append(checked)
    return found


def instructed(messages: Sequence[Message], instruction: str) -> Sequence[Message]:
    """The messages with an instruction behind their system message, or as one."""
    if not instruction or not isinstance(messages, Sequence) or not messages:
        return messages
    first = messages[0]
    if not isinstance(first, Mapping) or first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": instruction}, *messages]
    content = "\n\n".join(filter(None, [_text(first.get("content"), "messages[0]"), instruction]))
    return [{**first, "content": content}, *messages[1:]]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{place} must be an object, not a {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{place}.role is {role!r}: expected one of {', '.join(ROLES)}")
    checked = dict(message)
    checked["content"] = _text(message.get("content"), place)
    calls = message.get("tool_calls")
    checked.pop("tool_calls", None)
    if calls:
        checked["tool_calls"] = [
            _call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return checked


def _text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise TypeError(f"{place}.content must be a text or a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise TypeError(f"{place}.content has a part that is no {{'type': …}} object")
        if part["type"] not in ("text", "input_text", "output_text"):
            raise ValueError(
                f"{place}.content has a part of type {part['type']!r}: "
                "this engine reads text only, the vision part of the model is left out"
            )
        texts.append(str(part.get("text", "")))
    return "".join(texts)


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TypeError(f"{place} must be {{'function': {{'name': …, 'arguments': …}}}}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as problem:
            raise ValueError(f"{place}.function.arguments is not JSON: {problem}") from None
    if not isinstance(arguments, Mapping):
        raise TypeError(f"{place}.function.arguments must be a JSON object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _response(content: str) -> Any:
    """An object where a tool answered with one: the template writes its fields out."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return value if isinstance(value, dict) else content


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TypeError("each tool must be {'type': 'function', 'function': {'name': …}}")
    return {"type": "function", "function": {"description": "", "parameters": {}, **function}}
