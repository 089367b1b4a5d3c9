r"""Takes an answer apart: what is said, what is thought, and which tools are called.

Gemma 4 writes a thought as `<|channel>thought\n…<channel|>` and a call as
`<|tool_call>call:name{key:<|"|>text<|"|>,n:1}<tool_call|>`: an object literal whose keys are bare
and whose texts stand between `<|"|>` marks.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from .reader import QUOTE, read_calls

THOUGHT, THOUGHT_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
# The model asks for the response to its calls by opening one: nothing after it is the answer's.
RESPONSE, RESPONSE_END = "<|tool_response>", "<tool_response|>"

# Those that close nothing are left out of what is said.
_MARKS = (THOUGHT, THOUGHT_END, CALL, CALL_END, RESPONSE, RESPONSE_END, QUOTE)
_WORD = re.compile(r"\s*\w*\s*")
# The end of a call is not inside a text; a text that is not closed yet goes on to the end.
_QUOTED_OR_END = re.compile(
    r'<\|"\|>.*?(?:<\|"\|>|\Z)|"(?:[^"\\]|\\.)*(?:"|\Z)|<tool_call\|>', re.DOTALL
)


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(8)}")


@dataclass(frozen=True)
class Piece:
    """A bit of an answer: text that is said, text that is thought, or a call."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


def parse_call(text: str) -> ToolCall | None:
    """The first call in a text such as `call:name{…}`, or None where there is none."""
    calls = read_calls(text).calls
    return _made(*calls[0]) if calls else None


def _made(name: str, arguments: dict[str, Any]) -> ToolCall:
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


class AnswerParser:
    """Takes a text apart as it comes in. Marks cut in two by a border are held back and joined."""

    def __init__(self) -> None:
        self._pending = ""
        self._inside: str | None = None  # THOUGHT, CALL or RESPONSE
        self._named = False  # the thought's first line, the channel's name, is over

    def feed(self, text: str) -> list[Piece]:
        """What this text adds."""
        self._pending += text
        found: list[Piece] = []
        while self._next(found):
            pass
        return found

    def finish(self) -> list[Piece]:
        """What is left at the end.

        A call that is whole but for its closing mark counts. One that was cut off must not be
        carried out: it is given out as text.
        """
        found: list[Piece] = []
        while self._inside == CALL and (end := self._pending.find(CALL_END)) >= 0:
            self._take_calls(end, found)  # a quotation mark that is never closed hid the end
            while self._next(found):
                pass
        rest, self._pending = self._pending, ""
        if self._inside is None and rest:
            found.append(Piece(content=rest))
        elif self._inside == CALL:
            read = read_calls(rest)
            if read.calls and not read.cut:
                found += [Piece(call=_made(*call)) for call in read.calls]
                rest = read.rest
            if rest:
                found.append(Piece(content=_as_text(rest)))
        elif self._inside == THOUGHT and rest and (self._named or not "thought".startswith(rest)):
            found.append(Piece(reasoning=rest))
        return found

    def _next(self, found: list[Piece]) -> bool:
        """Takes one mark, or the text before it, off the pending text; False: wait for more."""
        if self._inside == CALL:
            return self._call(found)
        if self._inside == RESPONSE:
            self._pending = ""
            return False
        if self._inside == THOUGHT and not self._named:
            return self._name(found)
        at, mark = _first(self._pending, (THOUGHT_END,) if self._inside else _MARKS)
        text, self._pending = self._pending[:at], self._pending[at + len(mark) :]
        if text:
            found.append(Piece(reasoning=text) if self._inside else Piece(content=text))
        if mark:
            self._inside = mark if mark in (THOUGHT, CALL, RESPONSE) else None
            self._named = False
        return bool(mark)

    def _name(self, found: list[Piece]) -> bool:
        end, close = self._pending.find("\n"), self._pending.find(THOUGHT_END)
        if close >= 0 and not 0 <= end < close:
            # A channel that ends in its first line has no text, or no name.
            end = close - 1
            if not _WORD.fullmatch(self._pending[:close]):
                found.append(Piece(reasoning=self._pending[:close]))
        if end < 0 and close < 0:
            return False
        self._pending, self._named = self._pending[end + 1 :], True
        return True

    def _call(self, found: list[Piece]) -> bool:
        for match in _QUOTED_OR_END.finditer(self._pending):
            if match[0] == CALL_END:
                self._take_calls(match.start(), found)
                return True
        return False

    def _take_calls(self, end: int, found: list[Piece]) -> None:
        """Takes what stands up to `end` off the pending text, and the closing mark behind it."""
        read = read_calls(self._pending[:end])
        found += [Piece(call=_made(*call)) for call in read.calls]
        if read.rest:
            found.append(Piece(content=_as_text(read.rest)))
        self._pending, self._inside = self._pending[end + len(CALL_END) :], None


def _as_text(source: str) -> str:
    """What was to be a call and is none, without marks and in ordinary quotation marks."""
    source = source.replace(QUOTE, '"')
    for mark in _MARKS:
        source = source.replace(mark, "")
    return source


def _first(text: str, marks: tuple[str, ...]) -> tuple[int, str]:
    """Where the first mark stands, and which; or ("", where a mark may be about to begin)."""
    found = [(text.find(mark), mark) for mark in marks if mark in text]
    if found:
        return min(found)
    longest = max(map(len, marks)) - 1
    for at in range(max(0, len(text) - longest), len(text)):
        if any(mark.startswith(text[at:]) for mark in marks):
            return at, ""
    return len(text), ""


def split_answer(text: str) -> tuple[str, str, list[ToolCall]]:
    """What a whole answer says, what it thinks, and its calls."""
    parser = AnswerParser()
    pieces = parser.feed(text) + parser.finish()
    return (
        "".join(piece.content for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        [piece.call for piece in pieces if piece.call is not None],
    )
