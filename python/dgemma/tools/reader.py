r"""Reads calls as models write them: Gemma's syntax, JSON, and what lies between the two.

    calls     = { call [ "," | ";" | <|tool_call> ] }
    call      = [ "call:" ] NAME ( object | "(" { key "=" value "," } ")" | nothing )
              | JSON object with "name" and "arguments", or a list of such
    object    = "{" { key ":" value "," } "}"
    key       = MARKED | STRING | bare text up to its ":"
    value     = MARKED | STRING | object | "[" { value "," } "]" | NUMBER | WORD | bare text
    MARKED    = <|"|> any text <|"|>
    STRING    = as in JSON

Whatever the text is, reading it ends, and gives calls or says that there is none. Closing marks
that are missing count as written. What is no number of JSON (01234, 1e999) is a text, and so is
what is nested more than MAX_DEPTH deep.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUOTE = '<|"|>'
MAX_DEPTH = 64

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"(call:)?\s*([\w$@/.:-]+)\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_APOSTROPHES = re.compile(r"'((?:[^'\\]|\\.)*)'(?=\s*(?:[,)\]}:]|\Z))", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})?')
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_WORDS: dict[str, Any] = {
    "true": True, "false": False, "null": None, "None": None, "True": True, "False": False,
}  # fmt: skip
_BETWEEN = (",", ";", "<|tool_call>")  # calls
_ARGUMENTS = ("arguments", "parameters", "args", "input")


@dataclass(frozen=True)
class Read:
    """What a text calls: names with arguments, the text behind them, and whether it was cut off."""

    calls: list[tuple[str, dict[str, Any]]]
    rest: str
    cut: bool


def read_calls(text: str) -> Read:
    """The calls at the beginning of a text."""
    reader = _Reader(text)
    calls: list[tuple[str, dict[str, Any]]] = []
    end = 0
    while (found := reader.call()) is not None:
        calls += found
        end = reader.at
        while any(map(reader.take, _BETWEEN)):
            end = reader.at
    return Read(calls, text[end:].strip(), reader.cut)


def read_object(text: str) -> dict[str, Any]:
    """The object in a text: of JSON, as far as it goes where it is cut off or odd."""
    try:
        value = json.loads(text)
    except RecursionError:  # far beyond MAX_DEPTH
        return {"value": text}
    except ValueError:
        reader = _Reader(text)
        value = reader.value(0) if text.strip() else {}
        if text[reader.at :].strip():
            value = text
    if value is None:
        return {}
    if not isinstance(value, dict) or depth(value) > MAX_DEPTH:
        return {"value": value if depth(value) <= MAX_DEPTH else text}
    return value


def depth(value: Any) -> int:
    """How deep a value is nested; at most a little more than MAX_DEPTH."""
    deepest, pending = 0, [(value, 0)]
    while pending and deepest <= MAX_DEPTH:
        item, level = pending.pop()
        deepest = max(deepest, level)
        inner = item.values() if isinstance(item, Mapping) else item
        if isinstance(item, Mapping | list | tuple):
            pending.extend((each, level + 1) for each in inner)
    return deepest


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Gemma's template writes it; texts that hold its mark are written as JSON."""
    if QUOTE in json.dumps(arguments, ensure_ascii=False).replace('\\"', '"'):
        return f"call:{name}{json.dumps(arguments, ensure_ascii=False)}"
    return f"call:{name}{_written(arguments)}"


def write_value(value: Any, *, key: bool = False) -> str:
    """A value of an argument as Gemma's template writes it; `key`: a name of one."""
    return _key(str(value)) if key else _written(value)


def _written(value: Any) -> str:
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        pairs = (f"{_key(key)}:{_written(item)}" for key, item in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value, allow_nan=False)


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else f"{QUOTE}{key}{QUOTE}"


class _Reader:
    """A place in a text, and what begins there."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.cut = False  # something that was opened is not closed

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def take(self, token: str) -> bool:
        self.skip()
        found = self.text.startswith(token, self.at)
        self.at += len(token) if found else 0
        return found

    def at_end(self) -> bool:
        self.skip()
        return self.at >= len(self.text)

    def call(self) -> list[tuple[str, dict[str, Any]]] | None:
        """The call that begins here; None, and no step further, where there is none."""
        self.skip()
        start = self.at
        found = self._json_calls() if self.text[start : start + 1] in ("{", "[") else self._named()
        if found is None:
            self.at = start
        return found

    def _named(self) -> list[tuple[str, dict[str, Any]]] | None:
        match = _NAME.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        if self.take("{"):
            return [(match[2], self.pairs("}", ":", 0))]
        if self.take("("):
            before = self.at
            found = self.pairs(")", "=", 0)
            given = self.text[before : self.at].strip(" )")
            return [(match[2], found)] if found or not given else None
        # A name alone is a call only where it is called one.
        alone = self.at_end() or self.text.startswith("call:", self.at)
        return [(match[2], {})] if match[1] and alone else None

    def _json_calls(self) -> list[tuple[str, dict[str, Any]]] | None:
        value = self.value(0)
        found = []
        for item in value if isinstance(value, list) else [value]:
            function = item.get("function", item) if isinstance(item, dict) else None
            if not isinstance(function, dict):
                return None
            name = function.get("name")
            if not isinstance(name, str) or not name:
                return None
            given: Any = next((function[key] for key in _ARGUMENTS if key in function), {})
            given = read_object(given) if isinstance(given, str) else given
            found.append((name, given if isinstance(given, dict) else {"value": given}))
        return found or None

    def pairs(self, end: str, sign: str, level: int) -> dict[str, Any]:
        """Keys and values up to the closing mark; the opening one is already taken."""
        found: dict[str, Any] = {}
        while not self.take(end):
            if self.at_end():
                self.cut = True
                break
            before = self.at
            key = self._text()
            if key is None:
                key = self._bare(sign + "," + end)
            if self.take(sign) or self.take(":"):
                value = self.value(level + 1, "," + end)
                if key:
                    found[key] = value
            self.take(",")
            if self.at == before:
                self.at += 1  # a stray character: go on behind it
        return found

    def value(self, level: int, stops: str = ",}]") -> Any:
        """The value that begins here."""
        self.skip()
        start = self.at
        text = self._text()
        if text is not None:
            self.skip()
            if self.at >= len(self.text) or self.text[self.at] in stops + "}])":
                return text
            self.at = start  # more follows: the quotation marks belong to a longer text
            return self._bare(stops)
        opening = self.text[start : start + 1]
        if opening in ("{", "[") and level >= MAX_DEPTH:
            return self._balanced()
        if self.take("{"):
            return self.pairs("}", ":", level)
        if self.take("["):
            return self._items(level)
        word = self._bare(stops)
        if _NUMBER.fullmatch(word) and len(word) < 300 and math.isfinite(float(word)):
            return json.loads(word)
        return _WORDS.get(word, word)

    def _items(self, level: int) -> list[Any]:
        items: list[Any] = []
        while not self.take("]"):
            if self.at_end():
                self.cut = True
                break
            before = self.at
            items.append(self.value(level + 1, ",]"))
            self.take(",")
            if self.at == before:
                break
        return items

    def _text(self) -> str | None:
        """The quoted text that begins here, if one does."""
        self.skip()
        if self.text.startswith(QUOTE, self.at):
            start = self.at + len(QUOTE)
            end = self.text.find(QUOTE, start)
            self.cut |= end < 0
            end = len(self.text) if end < 0 else end
            self.at = min(end + len(QUOTE), len(self.text))
            return self.text[start:end]
        opening = self.text[self.at : self.at + 1]
        if opening == "'" and (match := _APOSTROPHES.match(self.text, self.at)):
            self.at = match.end()
            return match[1].replace("\\'", "'")
        if opening != '"':
            return None
        if match := _STRING.match(self.text, self.at):
            self.at = match.end()
            return _unescaped(match[0])
        self.cut = True
        cut, self.at = self.text[self.at :], len(self.text)
        return _unescaped(cut.rstrip("\\") + '"')

    def _bare(self, stops: str) -> str:
        """Text up to one of these characters; what is quoted in it may have them."""
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in stops:
            if self.text.startswith(QUOTE, self.at):
                end = self.text.find(QUOTE, self.at + len(QUOTE))
                self.at = len(self.text) if end < 0 else end + len(QUOTE)
            else:
                self.at += 1
        return self.text[start : self.at].strip()

    def _balanced(self) -> str:
        """The source of an object or a list, without reading it."""
        start, level = self.at, 0
        while self.at < len(self.text):
            if self.text[self.at] in "\"'" or self.text.startswith(QUOTE, self.at):
                before = self.at
                if self._text() is not None and self.at > before:
                    continue
            character = self.text[self.at]
            level += (character in "{[") - (character in "}]")
            self.at += 1
            if level == 0:
                return self.text[start : self.at]
        self.cut = True
        return self.text[start:]


def _unescaped(literal: str) -> str:
    """The text of a JSON string; escapes that JSON does not know stand for themselves."""
    try:
        return str(
            json.loads(_ESCAPE.sub(lambda m: m[0] if m[1] else r"\\", literal), strict=False)
        )
    except ValueError:
        return literal.strip('"')
