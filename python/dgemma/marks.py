"""Text is text: tells what a chat template wrote from what was put into it.

Control tokens are spelled with a few characters such as `<`, `|` and `>`. Before rendering, each
of these is replaced by a stand-in wherever it occurs in messages, tools and documents, one
character by one. Whatever the template does with its values, a control token in what it writes that
is spelled with the real characters is then the template's own; where stand-ins occur, it is text.
Tokens are found in that form, and only then do the stand-ins become what they stand for.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .errors import OptionValueError

MAX_DEPTH = 128  # of values in messages and tools
# Real templates write their values as JSON: a stand-in for what JSON escapes would not be escaped.
_NEVER = frozenset("_\"'\\")
# Symbols, because `repr` and JSON write them out, no case or normal form changes them, and few
# texts have any; then others that are as stable, for texts that do.
_RANGES = ((0x1D000, 0x1D0F6), (0x1F030, 0x1F094), (0x20000, 0x2A6E0), (0xF0000, 0xFFFFE))


class MarkedText(str):
    """A prompt that knows which control tokens its template wrote.

    It reads as the text that it is. `marked` is the same text with stand-ins, and `symbols` says
    what each stands for. What is added to it counts as the template's; any other operation gives an
    ordinary text, in which every control token is recognised.
    """

    marked: str
    symbols: Mapping[str, str]

    def __new__(cls, marked: str, symbols: Mapping[str, str] | None = None) -> MarkedText:
        """The text for a form with stand-ins."""
        symbols = symbols or {}
        made = super().__new__(cls, translated(marked, symbols))
        made.marked, made.symbols = marked, symbols
        return made

    def __add__(self, other: str) -> MarkedText:
        theirs = other if isinstance(other, MarkedText) else MarkedText(str(other))
        free = _unused({*self.marked, *theirs.marked, *self.symbols, *theirs.symbols})
        marked, symbols = "", {}
        for text in (self, theirs):  # what stands for something in one may be a text in the other
            fresh = {symbol: next(free) for symbol in text.symbols}
            marked += translated(text.marked, fresh)
            symbols.update({fresh[symbol]: c for symbol, c in text.symbols.items()})
        return MarkedText(marked, symbols)

    def __reduce__(self) -> Any:
        return MarkedText, (self.marked, dict(self.symbols))


def translated(text: str, symbols: Mapping[str, str]) -> str:
    """The text with every key of `symbols` replaced by its value."""
    for old, new in symbols.items():
        text = text.replace(old, new)
    return text


def delimiters(tokens: Iterable[str]) -> frozenset[str]:
    """The punctuation that these control tokens are spelled with."""
    characters = {character for token in tokens for character in token}
    return frozenset(
        c for c in characters - _NEVER if not c.isalnum() and not c.isspace() and c != "▁"
    )


def spelled_with(tokens: Iterable[str], characters: frozenset[str]) -> list[str]:
    """The tokens that cannot be spelled without one of these characters."""
    return [token for token in tokens if not characters.isdisjoint(token)]


def protect(
    values: Mapping[str, Any], characters: frozenset[str], source: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain copies of values with stand-ins for `characters`, and what these stand for.

    `source`: a text whose characters are no stand-ins either. Errors: OptionValueError for values
    that are nested too deeply or too large to be written.
    """
    used: set[str] = set()
    plain = {name: _copied(value, used.update, name) for name, value in values.items()}
    wanted = sorted(characters & used)
    if not wanted:
        return plain, {}
    free = _unused(used.union(source))
    symbols = {next(free): character for character in wanted}
    stand_ins = {character: symbol for symbol, character in symbols.items()}
    return mapped(plain, lambda text: translated(text, stand_ins)), symbols


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a plain value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {mapped(k, change): mapped(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    if isinstance(value, tuple):
        return tuple(mapped(item, change) for item in value)
    return value


def _copied(value: Any, see: Callable[[str], None], name: str, depth: int = 0) -> Any:
    """A copy made of what JSON knows; `see` is told every text."""
    if depth > MAX_DEPTH:
        raise OptionValueError(
            f"{name} is nested more than {MAX_DEPTH} deep: flatten it, or send it as a text",
            param=name,
        )
    if isinstance(value, str):
        text = str.__str__(value)
        see(text)
        return text
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if value.bit_length() > 13_000:
            raise OptionValueError(
                f"{name} has a number of about {value.bit_length() * 3 // 10} digits: "
                "send it as a text",
                param=name,
            )
        return int(value)
    if isinstance(value, Mapping):
        made = {}
        for key, item in value.items():
            text = str(key)
            see(text)
            made[text] = _copied(item, see, name, depth + 1)
        return made
    if isinstance(value, list | tuple | set | frozenset):
        return [_copied(item, see, name, depth + 1) for item in value]
    text = str(value)
    see(text)
    return text


def _unused(used: set[str]) -> Iterator[str]:
    for first, end in _RANGES:
        for code in range(first, end):
            if (symbol := chr(code)) not in used and unicodedata.category(symbol) != "Cn":
                yield symbol
    raise OptionValueError("messages: they use every rare character that there is")
