"""Answers in the dictionaries of the OpenAI API, spelled as llama-cpp-python spells them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..chat.template import Message, instructed
from ..generation.generate import Answer, Commit, Draft, Generated
from ..generation.structured import Form, call_form, json_form
from ..tools.answer import CALL, AnswerParser, Piece, ToolCall

if TYPE_CHECKING:
    from ..model import DiffusionGemma

JsonObject: TypeAlias = dict[str, Any]


class Completion:
    """One text completion."""

    def __init__(
        self,
        llm: DiffusionGemma,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 16,
        suffix: str | None = None,
        echo: bool = False,
        model: str | None = None,
        **options: Any,
    ) -> None:
        if suffix:
            options["pinned"], max_tokens = _behind_gap(llm, suffix, max_tokens)
        self.answer = llm.answer(prompt, max_tokens=max_tokens, **options)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model or llm.model_path,
        }
        self._before = ""
        self._after = suffix or ""
        if echo:
            self._before = prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)

    def events(self) -> Iterator[Draft | JsonObject]:
        """Drafts, and the chunks of a streamed completion between them."""
        if self._before:
            yield self._chunk(self._before)
        for event in self.answer:
            if isinstance(event, Draft):
                yield event
            elif event.text:
                yield self._chunk(event.text)
        yield self._chunk(self._after, self.answer.result.finish_reason)

    def chunks(self) -> Iterator[JsonObject]:
        """The chunks of a streamed completion."""
        return (event for event in self.events() if not isinstance(event, Draft))

    def whole(self) -> JsonObject:
        """The completion in one piece."""
        result = _finished(self.answer)
        text = self._before + result.text + self._after
        return {**self._chunk(text, result.finish_reason), "usage": usage(result)}

    def _chunk(self, text: str, finish_reason: str | None = None) -> JsonObject:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}


def _behind_gap(
    llm: DiffusionGemma, suffix: str, max_tokens: int | None
) -> tuple[dict[int, int], int]:
    """Pinned tokens of a suffix behind a gap of `max_tokens`, and that number."""
    length = llm.info.canvas_length
    gap = length // 2 if max_tokens is None else max_tokens
    if not 1 <= gap < length:
        raise ValueError(
            f"max_tokens is {gap}: with a suffix, the gap and some of the suffix must fit "
            f"a canvas of {length} tokens"
        )
    after = llm.tokenizer.encode(suffix, special=False)[: length - gap]
    return {gap + i: token for i, token in enumerate(after)}, gap


class ChatCompletion:
    """One answer in a conversation.

    `tool_choice`: "auto", "none", "required", or {"type": "function", "function": {"name": …}}.
    `response_format`: see `structured.json_form`; a call that is asked for comes before it.
    """

    def __init__(
        self,
        llm: DiffusionGemma,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        enable_thinking: bool = False,
        model: str | None = None,
        **options: Any,
    ) -> None:
        self._parser = AnswerParser()
        given, form = _forced_call(tools, tool_choice)
        if response_format is not None:
            may_call = bool(tools) and tool_choice != "none"
            asked, instruction = json_form(
                response_format, after_thought=enable_thinking, or_call=may_call
            )
            messages = instructed(messages, instruction)
            form = form or asked
        prompt = llm.chat_template.render(
            messages,
            tools=None if tool_choice == "none" else tools,
            enable_thinking=enable_thinking,
        )
        # What is put into the model's mouth is part of its answer.
        self._given = self._parser.feed(given)
        self.answer = llm.answer(prompt + given, form=form, **options)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model or llm.model_path,
        }
        self._n_calls = 0
        self._may_call = tool_choice != "none"

    def events(self) -> Iterator[Draft | JsonObject]:
        """Drafts, and the chunks of a streamed answer between them."""
        yield self._chunk({"role": "assistant"})
        for event in self.answer:
            if isinstance(event, Draft):
                yield event
                continue
            for piece in self._pieces(event):
                yield self._chunk(self._delta(piece))
        reason = self.answer.result.finish_reason
        yield self._chunk({}, "tool_calls" if self._n_calls and reason == "stop" else reason)

    def chunks(self) -> Iterator[JsonObject]:
        """The chunks of a streamed answer."""
        return (event for event in self.events() if not isinstance(event, Draft))

    def whole(self) -> JsonObject:
        """The answer in one piece."""
        pieces: list[Piece] = []
        for event in self.answer:
            if isinstance(event, Commit):
                pieces.extend(self._pieces(event))
        result = self.answer.result
        content = "".join(piece.content for piece in pieces)
        reasoning = "".join(piece.reasoning for piece in pieces)
        calls = [piece.call for piece in pieces if piece.call is not None]
        message: JsonObject = {"role": "assistant", "content": content}
        reason = result.finish_reason
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
            message["content"] = content.strip() or None
            reason = "tool_calls" if reason == "stop" else reason
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(result),
        }

    def _pieces(self, commit: Commit) -> list[Piece]:
        pieces = self._parser.feed(commit.text)
        if commit.finish_reason is not None:
            pieces += self._parser.finish()
        return [piece for piece in pieces if piece.call is None or self._may_call]

    def _delta(self, piece: Piece) -> JsonObject:
        if piece.call is not None:
            self._n_calls += 1
            return {"tool_calls": [{"index": self._n_calls - 1, **_call(piece.call)}]}
        if piece.reasoning:
            return {"reasoning_content": piece.reasoning}
        return {"content": piece.content}

    def _chunk(self, delta: JsonObject, finish_reason: str | None = None) -> JsonObject:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def usage(result: Generated) -> JsonObject:
    """Token counts of an answer."""
    stats = result.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }


def _finished(answer: Answer) -> Generated:
    for _ in answer:
        pass
    return answer.result


def _call(call: ToolCall) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _forced_call(
    tools: Iterable[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None
) -> tuple[str, Form | None]:
    """The beginning of the answer that a tool choice leaves no other way, and the form of the rest.

    The begun call is encoded with the prompt: the canvas settles behind it.
    """
    if choice in (None, "auto", "none"):
        return "", None
    names = [tool["function"]["name"] for tool in tools or [] if "function" in tool]
    if not names:
        raise ValueError("tool_choice asks for a call, but there are no tools")
    if choice != "required":
        wanted = choice.get("function", {}).get("name") if isinstance(choice, Mapping) else None
        if wanted not in names:
            raise ValueError(f"tool_choice {choice!r} is none of the tools: {', '.join(names)}")
        names = [wanted]
    if len(names) == 1:
        return f"{CALL}call:{names[0]}{{", call_form(names, named=True)
    return f"{CALL}call:", call_form(names, named=False)
