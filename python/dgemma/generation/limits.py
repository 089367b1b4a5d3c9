"""What a schema says of numbers, texts and lists beyond their type: as checks, and as grammar.

Patterns are read by the grammars' own regular expressions, which take linear time; one that they
do not know (look-around) limits nothing.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from ..errors import OptionError
from .grammars import matcher

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_MAX_TEXT = 2000  # characters, and
_MAX_ITEMS = 200  # items that a grammar counts; where more may stand, it does not count


def number_fits(value: float, schema: Mapping[str, Any]) -> bool:
    """Whether a number is within the bounds."""
    bounds = _number_bounds(schema)
    multiple = bounds.get("multipleOf", 0)
    if multiple > 0:
        share = value / multiple
        if not math.isclose(share, round(share), rel_tol=1e-9, abs_tol=1e-9):
            return False
    return (
        value >= bounds.get("minimum", -math.inf)
        and value <= bounds.get("maximum", math.inf)
        and ("exclusiveMinimum" not in bounds or value > bounds["exclusiveMinimum"])
        and ("exclusiveMaximum" not in bounds or value < bounds["exclusiveMaximum"])
    )


def text_fits(value: str, schema: Mapping[str, Any]) -> bool:
    """Whether a text has the length and the pattern."""
    low, high = _counts(schema, "minLength", "maxLength")
    if len(value) < low or (high is not None and len(value) > high):
        return False
    made = _pattern(schema.get("pattern"))
    if made is None:
        return True
    here, data = made[1].deep_copy(), list(value.encode())
    if here.validate_tokens(data) < len(data):
        return False
    here.consume_tokens(data)
    return bool(here.is_accepting())


def list_fits(value: list[Any], schema: Mapping[str, Any]) -> bool:
    """Whether a list has so many items."""
    low, high = _counts(schema, "minItems", "maxItems")
    return low <= len(value) and (high is None or len(value) <= high)


def number_grammar(kind: str, schema: Mapping[str, Any]) -> str | None:
    """A number of this kind within the bounds; None where there are none."""
    bounds = _number_bounds(schema)
    return f"%json {json.dumps({'type': kind, **bounds})}" if bounds else None


def text_grammar(schema: Mapping[str, Any]) -> str | None:
    """The characters of a text as a terminal of lark; None where all of `INNER` may stand."""
    low, high = _counts(schema, "minLength", "maxLength")
    high = None if high is None or high > _MAX_TEXT else high
    low = min(low, _MAX_TEXT)
    made = _pattern(schema.get("pattern"))
    if not low and high is None and made is None:
        return None
    counted = f"/(?s:.){{{low},{'' if high is None else high}}}/ & INNER"
    return f"({counted})" if made is None else f"({made[0]} & {counted})"


def list_grammar(item: str, schema: Mapping[str, Any]) -> str:
    """A list of such items."""
    low, high = _counts(schema, "minItems", "maxItems")
    high = None if high is None or high > _MAX_ITEMS else high
    low = min(low, _MAX_ITEMS)
    if high == 0:
        return '"[" "]"'
    more = f'("," {item}){{{max(0, low - 1)},{"" if high is None else high - 1}}}'
    return f'"[" {item} {more} "]"' if low else f'"[" ({item} {more})? "]"'


def _number_bounds(schema: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: schema[name]
        for name in _BOUNDS
        if isinstance(schema.get(name), int | float) and not isinstance(schema[name], bool)
    }


def _counts(schema: Mapping[str, Any], low: str, high: str) -> tuple[int, int | None]:
    found = [schema.get(name) for name in (low, high)]
    known = [
        int(n) if isinstance(n, int | float) and not isinstance(n, bool) and n >= 0 else None
        for n in found
    ]
    return known[0] or 0, known[1]


def _pattern(pattern: Any) -> tuple[str, Any] | None:
    return _read(pattern) if isinstance(pattern, str) else None


@functools.lru_cache(maxsize=256)
def _read(pattern: str) -> tuple[str, Any] | None:
    """A pattern that may stand anywhere in a text, for lark, and its matcher; None: not known."""
    body = pattern.removeprefix("^")
    whole = body.endswith("$") and not body.endswith("\\$")
    before = "" if pattern.startswith("^") else "(?s:.*)"
    body = f"{before}({body[:-1] if whole else body}){'' if whole else '(?s:.*)'}"
    try:
        made = matcher(LLMatcher.grammar_from_regex(body), "tools")
    except (OptionError, ValueError):
        return None
    return "/" + body.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n") + "/", made
