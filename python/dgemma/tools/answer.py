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

QUOTE = '<|"|>'
THOUGHT, THOUGHT_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
# The model asks for the response to its calls by opening one: nothing after it is the answer's.
RESPONSE = "<|tool_response>"

_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?\Z")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "None": None}


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


class _Literal:
    """Reads one object literal. Never fails: what is cut off or odd is read as far as it goes."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1

    def _take(self, token: str) -> bool:
        self._skip()
        found = self.text.startswith(token, self.at)
        self.at += len(token) if found else 0
        return found

    def _quoted(self, mark: str) -> str:
        end = self.text.find(mark, self.at)
        end = len(self.text) if end < 0 else end
        found, self.at = self.text[self.at : end], end + len(mark)
        return found

    def _bare(self, stops: str) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in stops:
            self.at += 1
        return self.text[start : self.at].strip()

    def object(self, depth: int = 0) -> dict[str, Any]:
        """Pairs up to the closing brace or the end; the opening brace is already taken."""
        found: dict[str, Any] = {}
        while not self._take("}") and self.at < len(self.text):
            before = self.at
            if self._take(QUOTE):
                key = self._quoted(QUOTE)
            elif self._take('"'):
                key = self._quoted('"')
            else:
                key = self._bare(":,}")
            if self._take(":"):
                value = self.value(depth + 1)
                if key:
                    found[key] = value
            self._take(",")
            if self.at == before:
                self.at += 1  # a stray character: go on behind it
        return found

    def value(self, depth: int) -> Any:
        if depth > 64:
            self.at = len(self.text)
            return None
        if self._take(QUOTE):
            return self._quoted(QUOTE)
        if self._take('"'):
            return self._quoted('"')
        if self._take("{"):
            return self.object(depth)
        if self._take("["):
            items: list[Any] = []
            while not self._take("]") and self.at < len(self.text):
                before = self.at
                items.append(self.value(depth + 1))
                self._take(",")
                if self.at == before:
                    break
            return items
        word = self._bare(",}]")
        if _NUMBER.match(word) and len(word) < 300:
            return json.loads(word)
        return _WORDS.get(word, word)


def parse_call(text: str) -> ToolCall | None:
    """The call in `call:name{…}`, or None where that is not what it says."""
    head, brace, rest = text.strip().partition("{")
    name = head.removeprefix("call:").strip()
    if not name or not head.startswith("call:"):
        return None
    arguments = _Literal(rest).object() if brace else {}
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


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
        """What is left at the end: an unfinished call is dropped, other text is given out."""
        rest, self._pending = self._pending, ""
        if self._inside is None:
            return [Piece(content=rest)] if rest else []
        if self._inside == THOUGHT and self._named and rest:
            return [Piece(reasoning=rest)]
        return []

    def _next(self, found: list[Piece]) -> bool:
        """Takes one mark, or the text before it, off the pending text; False: wait for more."""
        if self._inside == CALL:
            return self._call(found)
        if self._inside == RESPONSE:
            self._pending = ""
            return False
        if self._inside == THOUGHT and not self._named:
            return self._name()
        marks = (THOUGHT_END,) if self._inside else (THOUGHT, THOUGHT_END, CALL, RESPONSE)
        at, mark = _first(self._pending, marks)
        text, self._pending = self._pending[:at], self._pending[at + len(mark) :]
        if text:
            found.append(Piece(reasoning=text) if self._inside else Piece(content=text))
        if mark:
            self._inside = None if mark == THOUGHT_END else mark
            self._named = False
        return bool(mark)

    def _name(self) -> bool:
        end, close = self._pending.find("\n"), self._pending.find(THOUGHT_END)
        if close >= 0 and not 0 <= end < close:
            end = close - 1  # a channel that ends in its first line has no text
        if end < 0 and close < 0:
            return False
        self._pending, self._named = self._pending[end + 1 :], True
        return True

    def _call(self, found: list[Piece]) -> bool:
        end = 0
        while True:
            end = self._pending.find(CALL_END, end)
            if end < 0:
                return False
            if self._pending.count(QUOTE, 0, end) % 2 == 0:
                break
            end += 1  # the mark is part of a text
        call = parse_call(self._pending[:end])
        if call is not None:
            found.append(Piece(call=call))
        self._pending, self._inside = self._pending[end + len(CALL_END) :], None
        return True


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
