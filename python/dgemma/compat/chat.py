"""Answers in conversations in the dictionaries of the OpenAI API, with thoughts and tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..chat import Message, instructed
from ..errors import OptionTypeError
from ..generation.arguments import fitted
from ..generation.events import Commit, Draft, Generated
from ..generation.free_calls import FreeCalls
from ..generation.structured import Form, call_form, json_form
from ..tools.answer import CALL, AnswerParser, Piece, ToolCall
from ..tools.declared import checked_tools, chosen_tools
from .answers import Completions, JsonObject
from .host import Host
from .requests import choices


class ChatCompletion(Completions):
    """The answers to one conversation, `n` of them.

    `tool_choice`: "auto", "none", "required", or {"type": "function", "function": {"name": …}}.
    `response_format`: see `structured.json_form`; a call that is asked for comes before it.
    `functions` and `function_call` are older names of `tools` and `tool_choice`.
    """

    def __init__(
        self,
        llm: Host,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        functions: Sequence[Mapping[str, Any]] | None = None,
        function_call: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        model: str | None = None,
        n: int | None = None,
        stream_options: Mapping[str, Any] | None = None,
        warnings: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__("chatcmpl", model or llm.model_path, stream_options, warnings)
        thinking, more = _thinking(enable_thinking, chat_template_kwargs)
        self.warnings += more
        self._legacy = functions is not None and tools is None
        if self._legacy:
            tools, tool_choice = _as_tools(functions or (), function_call, tool_choice)
        mode, names = chosen_tools(tools, tool_choice)
        tools = [
            tool for tool in checked_tools(tools)
            if mode == "required" or (mode == "auto" and tool["function"]["name"] in names)
        ]  # fmt: skip
        chosen = [tool for tool in tools if tool["function"]["name"] in names]
        self._given, form = _forced_call(mode, chosen)
        calls = FreeCalls(chosen) if chosen and mode == "auto" else None
        if response_format is not None:
            asked, instruction = json_form(response_format, after_thought=thinking, calls=calls)
            messages = instructed(messages, instruction)
            form = form or asked
        form = form or calls
        self._parameters = {
            tool["function"]["name"]: tool["function"].get("parameters") for tool in chosen
        }
        prompt = llm.chat_template.render(
            messages,
            tools=tools,
            enable_thinking=thinking,
        )
        self._n = choices(n)
        self.choices = llm.choices(
            [prompt + self._given],
            n=self._n,
            form=form,
            max_tokens=max_tokens if max_completion_tokens is None else max_completion_tokens,
            **options,
        )
        self._may_call = mode != "none"

    def events(self) -> Iterator[Draft | JsonObject]:
        """Drafts, and the chunks of a streamed answer between them."""
        readers = [self._reader() for _ in self.choices.answers]
        for index in range(len(readers)):
            yield self._chunk(index, {"role": "assistant"})
        for index, event in self.choices:
            if isinstance(event, Draft):
                yield event
                continue
            reader = readers[index]
            for piece in reader.pieces(event):
                yield self._chunk(index, self._delta(piece, reader))
            if event.finish_reason is not None:
                yield self._chunk(index, {}, self._reason(event.finish_reason, reader.n_calls))

    def whole(self) -> JsonObject:
        """The answers in one piece."""
        pieces: list[list[Piece]] = [[] for _ in self.choices.answers]
        readers = [self._reader() for _ in pieces]
        for index, event in self.choices:
            if isinstance(event, Commit):
                pieces[index].extend(readers[index].pieces(event))
        results = self.choices.results
        made = self._whole([self._choice(i, p, results[i]) for i, p in enumerate(pieces)])
        return {**made, "object": "chat.completion"}

    def _reader(self) -> _Reader:
        return _Reader(self._given, self._may_call, self._parameters)

    def _choice(self, index: int, pieces: list[Piece], result: Generated) -> JsonObject:
        content = "".join(piece.content for piece in pieces)
        reasoning = "".join(piece.reasoning for piece in pieces)
        calls = [_call(piece.call) for piece in pieces if piece.call is not None]
        message: JsonObject = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["content"] = content.strip() or None
            message["tool_calls"] = calls
            if self._legacy:
                message["function_call"] = calls[0]["function"]
        return {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._reason(result.finish_reason, len(calls)),
        }

    def _reason(self, reason: str, n_calls: int) -> str:
        if not n_calls or reason != "stop":
            return reason
        return "function_call" if self._legacy else "tool_calls"

    def _delta(self, piece: Piece, reader: _Reader) -> JsonObject:
        if piece.call is not None:
            call = _call(piece.call)
            delta: JsonObject = {"tool_calls": [{"index": reader.n_calls - 1, **call}]}
            if self._legacy and reader.n_calls == 1:
                delta["function_call"] = call["function"]
            return delta
        if piece.reasoning:
            return {"reasoning_content": piece.reasoning}
        return {"content": piece.content}

    def _chunk(self, index: int, delta: JsonObject, finish_reason: str | None = None) -> JsonObject:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


class _Reader:
    """Takes one answer apart as it comes in, and counts its calls.

    `given` was put into the model's mouth, and is part of its answer. `parameters`: of each tool.
    """

    def __init__(
        self, given: str, may_call: bool, parameters: Mapping[str, Any] | None = None
    ) -> None:
        self._parser, self._may_call = AnswerParser(), may_call
        self._parameters = parameters or {}
        self._parser.feed(given)
        self.n_calls = 0

    def pieces(self, commit: Commit) -> Iterator[Piece]:
        """What this text adds."""
        pieces = self._parser.feed(commit.text)
        if commit.finish_reason is not None:
            pieces += self._parser.finish()
        for piece in pieces:
            if piece.call is not None and not self._may_call:
                continue
            self.n_calls += piece.call is not None
            yield piece if piece.call is None else Piece(call=self._fitted(piece.call))

    def _fitted(self, call: ToolCall) -> ToolCall:
        """The call with arguments as its tool wants them, where it is plain what they mean."""
        try:
            arguments = json.loads(call.arguments)
        except ValueError:  # a number with too many digits
            return call
        made = fitted(arguments, self._parameters.get(call.name))
        if made is None or repr(made) == repr(arguments):
            return call
        return replace(call, arguments=json.dumps(made, ensure_ascii=False))


def _thinking(
    enabled: bool | None, template_options: Mapping[str, Any] | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether the model may think, and sentences about other options of templates."""
    if template_options is not None and not isinstance(template_options, Mapping):
        raise OptionTypeError(
            "chat_template_kwargs must be an object", param="chat_template_kwargs"
        )
    others = dict(template_options or {})
    asked = others.pop("enable_thinking", None)
    enabled = asked if enabled is None else enabled
    if enabled is not None and not isinstance(enabled, bool):
        raise OptionTypeError(
            f"enable_thinking must be true or false, not {enabled!r}", param="enable_thinking"
        )
    return bool(enabled), tuple(
        f"chat_template_kwargs.{name} is not known here and was ignored" for name in others
    )


def _as_tools(
    functions: Sequence[Mapping[str, Any]],
    function_call: str | Mapping[str, Any] | None,
    tool_choice: str | Mapping[str, Any] | None,
) -> tuple[list[Mapping[str, Any]], str | Mapping[str, Any] | None]:
    """The tools and the choice that the older fields of the API stand for."""
    tools = [{"type": "function", "function": function} for function in functions]
    if isinstance(function_call, Mapping):
        return list(tools), {"type": "function", "function": dict(function_call)}
    return list(tools), tool_choice if function_call is None else function_call


def _call(call: ToolCall) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _forced_call(mode: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, Form | None]:
    """The beginning of the answer that a tool choice leaves no other way, and the form of the rest.

    The begun call is encoded with the prompt: the canvas settles behind it.
    """
    if mode != "required":
        return "", None
    if len(tools) == 1:
        name = tools[0]["function"]["name"]
        return f"{CALL}call:{name}{{", call_form(tools, named=True)
    return f"{CALL}call:", call_form(tools, named=False)
