"""The grammar of calls of given tools in Gemma's syntax, with arguments that fit their schemas.

Known are types, properties, required, items, enum, const, anyOf, oneOf, references within the
schema, allOf of one, and the limits of numbers, texts and lists. What else a schema says is for the
program that carries the call out; where a part of it cannot be told, any value may stand.
Properties come in any order where there are few, otherwise in that of the template, which sorts
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionValueError
from ..tools.answer import CALL, CALL_END
from ..tools.reader import write_value
from .grammars import check_depth, target
from .limits import list_grammar, number_grammar, text_grammar

_ANY_ORDER = 4  # properties; the orders of more make grammars large
_MAX_PROPERTIES = 60  # of an object; one with more may have any
_MAX_RULES = 4000  # of all tools together; beyond, any value may stand
# No mark stands inside of a text: one that is not closed would go on behind the call.
_BASE = rf"""
END: "{CALL_END}"
object: "{{" pairs? "}}"
pairs: pair ("," pair)*
pair: KEY ":" value
value: TEXT | NUMBER | truth | "null" | object | array
truth: "true" | "false"
array: "[" (value ("," value)*)? "]"
KEY: /[A-Za-z_][A-Za-z0-9_.-]*/
TEXT: "<|\"|>" INNER "<|\"|>"
INNER: /(?s:.*)/ & ~/(?s:.*)(<\||<[a-z_]+\|>)(?s:.*)/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
INTEGER: /-?(0|[1-9][0-9]*)/
"""
_TYPES = {
    "string": "TEXT", "number": "NUMBER", "integer": "INTEGER", "boolean": "truth",
    "null": '"null"', "array": "array", "object": "object",
}  # fmt: skip


def call_grammar(tools: Sequence[Mapping[str, Any]], *, named: bool, whole: bool = False) -> str:
    """The grammar of one or more calls, as lark writes it.

    `<|tool_call>call:` already stands; where it is `named`, so do the only name and its brace.
    `whole`: one call, of which nothing stands.
    Errors: OptionValueError, with the place in `param`.
    """
    rules: list[str] = []
    bodies = []
    for index, tool in enumerate(tools):
        schema = tool["function"].get("parameters") or {}
        place = f"tools[{index}].function.parameters"
        check_depth(schema, place)
        made = _Arguments(schema, f"t{index}", _MAX_RULES - len(rules))
        try:
            bodies.append(made.body())
        except RecursionError:
            raise OptionValueError(
                f"{place}: its references lead too far: use fewer", param=place
            ) from None
        rules += made.rules
    calls = " | ".join(
        f'{json.dumps(tool["function"]["name"] + "{", ensure_ascii=False)} {body} "}}"'
        for tool, body in zip(tools, bodies, strict=True)
    )
    first = f'{bodies[0]} "}}"' if named else "call"
    start = "more" if whole else f"{first} END more*"
    head = f'start: {start}\nmore: "{CALL}call:" call END\ncall: {calls}'
    return "\n".join([head, *rules]) + _BASE


class _Arguments:
    """The rules of one tool's arguments."""

    def __init__(self, schema: Mapping[str, Any], prefix: str, max_rules: int) -> None:
        self._max_rules = max_rules
        self._root, self._prefix = schema, prefix
        self.rules: list[str] = []
        self._references: dict[str, str] = {}

    def body(self) -> str:
        """What stands between the braces of the arguments."""
        schema, seen = self._root, set()
        while isinstance(schema.get("$ref"), str) and schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            found = target(self._root, schema["$ref"])
            schema = found if isinstance(found, Mapping) else {}
        return self._pairs(schema)

    def _rule(self, definition: str) -> str:
        name = f"{self._prefix}_{len(self.rules)}"
        self.rules.append(f"{name}: {definition}")
        return name

    def _pairs(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not 0 < len(properties) <= _MAX_PROPERTIES:
            return "pairs?"
        if len(self.rules) >= self._max_rules:
            return "pairs?"
        required = schema.get("required")
        given = required if isinstance(required, list | tuple) else ()
        needed = {name for name in given if isinstance(name, str) and name in properties}
        values = {str(name): self._value(value) for name, value in properties.items()}
        names = sorted(values, key=lambda name: (name.lower(), name))
        made: dict[tuple[tuple[str, ...], bool], str] = {}

        def rest(remaining: tuple[str, ...], first: bool) -> str:
            if (remaining, first) not in made:
                any_order = len(names) <= _ANY_ORDER
                ways = [] if needed & set(remaining) else ['""']
                for at, name in enumerate(remaining):
                    left = remaining[:at] * any_order + remaining[at + 1 :]
                    key = write_value(name, key=True) + ":"
                    sign = json.dumps(("" if first else ",") + key, ensure_ascii=False)
                    ways.append(f"{sign} {values[name]} {rest(left, False)}")
                    if name in needed and not any_order:
                        break
                made[remaining, first] = self._rule(" | ".join(ways))
            return made[remaining, first]

        return rest(tuple(names), True)

    def _value(self, schema: Any) -> str:
        if not isinstance(schema, Mapping) or len(self.rules) >= self._max_rules:
            return "value"
        if isinstance(reference := schema.get("$ref"), str):
            return self._referred(reference)
        for key in ("const", "enum"):
            given = [schema["const"]] if key in schema and key == "const" else schema.get(key)
            if isinstance(given, list) and given:
                written = (json.dumps(write_value(v), ensure_ascii=False) for v in given)
                return self._rule(" | ".join(written))
        for key in ("anyOf", "oneOf", "allOf"):
            given = schema.get(key)
            if isinstance(given, list) and given and (key != "allOf" or len(given) == 1):
                return self._rule(" | ".join(map(self._value, given)))
        kinds = schema.get("type", "object" if "properties" in schema else None)
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not kinds or not all(isinstance(kind, str) and kind in _TYPES for kind in kinds):
            return "value"
        return self._rule(" | ".join(self._typed(kind, schema) for kind in kinds))

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "object" and isinstance(schema.get("properties"), Mapping):
            return f'"{{" {self._pairs(schema)} "}}"'
        if kind == "array":
            items = schema.get("items")
            return list_grammar(
                self._value(items) if isinstance(items, Mapping) else "value", schema
            )
        if kind in ("number", "integer"):
            return number_grammar(kind, schema) or _TYPES[kind]
        if kind == "string" and (text := text_grammar(schema)) is not None:
            return self._terminal(f'"<|\\"|>" {text} "<|\\"|>"')
        return _TYPES[kind]

    def _terminal(self, definition: str) -> str:
        name = f"{self._prefix}_{len(self.rules)}".upper()
        self.rules.append(f"{name}: {definition}")
        return name

    def _referred(self, reference: str) -> str:
        if reference not in self._references:
            name = f"{self._prefix}_r{len(self._references)}"
            self._references[reference] = name
            found = target(self._root, reference)
            value = "value" if found is self._root and reference != "#" else self._value(found)
            self.rules.append(f"{name}: {'value' if value == name else value}")
        return self._references[reference]
