"""Whether the arguments of a call fit its tool's parameters, and what was plainly meant by others.

The parts of a schema that count are those that `call_grammar` knows. Properties that a schema does
not name may stand, unless it says `additionalProperties: false`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from .grammars import target
from .limits import list_fits, number_fits, text_fits

_MAX_LEVELS = 200  # of schemas within each other; what lies deeper may be anything
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,300})(\.[0-9]{1,300})?([eE][+-]?[0-9]{1,3})?")


class _MisfitError(Exception):
    """A value that does not fit."""


def fitted(arguments: Mapping[str, Any], parameters: Any) -> dict[str, Any] | None:
    """The arguments as the parameters, a JSON schema, want them; None where they do not fit.

    Numbers and truths that were written as texts become what they are and the other way round, one
    value becomes a list of one where a list is wanted, and null is left out where a property is
    optional and cannot be null.
    """
    try:
        found = _fit(dict(arguments), parameters or {}, parameters or {}, 0)
    except (_MisfitError, ValueError, TypeError, RecursionError):  # odd schemas, endless numbers
        return None
    return found if isinstance(found, dict) else None


def _fit(value: Any, schema: Any, root: Any, level: int) -> Any:
    if schema is False:
        raise _MisfitError
    if not isinstance(schema, Mapping) or level > _MAX_LEVELS:
        return value
    level += 1
    if isinstance(reference := schema.get("$ref"), str):
        found = target(root, reference)
        return value if found is root and reference != "#" else _fit(value, found, root, level)
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(allowed, list) and allowed:
        return _one_of(value, allowed)
    every = schema.get("allOf")
    for part in every if isinstance(every, list) else ():
        value = _fit(value, part, root, level)
    for key in ("anyOf", "oneOf"):
        if isinstance(ways := schema.get(key), list) and ways:
            value = _best(value, [(way, root, level) for way in ways], _fit)
    kinds = schema.get("type", "object" if "properties" in schema else None)
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return _best(value, [(kind, schema, root, level) for kind in kinds], _typed)


def _best(value: Any, ways: list[Any], fit: Any) -> Any:
    """What the first way makes of a value that leaves it as it is, or else the first that fits."""
    found = []
    for way in ways:
        try:
            made = fit(value, *way)
        except _MisfitError:
            continue
        if _same(made, value):
            return made
        found.append(made)
    if not found:
        raise _MisfitError
    return found[0]


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _one_of(value: Any, allowed: list[Any]) -> Any:
    for option in allowed:
        if _same(option, value) or (_is_number(option) and _is_number(value) and option == value):
            return option
    for option in allowed:
        if _text(option) == _text(value):
            return option
    raise _MisfitError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _typed(value: Any, kind: Any, schema: Mapping[str, Any], root: Any, level: int) -> Any:
    if kind == "object":
        return _object(_read(value, dict), schema, root, level)
    if kind == "array":
        return _array(value, schema, root, level)
    if kind in ("number", "integer"):
        return _limited(_number(value, whole=kind == "integer"), number_fits, schema)
    if kind == "string":
        if value is None or isinstance(value, dict | list):
            raise _MisfitError
        text = value if isinstance(value, str) else json.dumps(value)
        return _limited(text, text_fits, schema)
    if kind == "boolean" and not isinstance(value, bool):
        if not isinstance(value, str) or value.strip().lower() not in ("true", "false"):
            raise _MisfitError
        return value.strip().lower() == "true"
    if kind == "null" and value is not None:
        raise _MisfitError
    return value


def _limited(value: Any, fits: Callable[[Any, Any], bool], schema: Mapping[str, Any]) -> Any:
    if not fits(value, schema):
        raise _MisfitError
    return value


def _number(value: Any, *, whole: bool) -> Any:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = json.loads(value)
    if not _is_number(value) or (isinstance(value, float) and not math.isfinite(value)):
        raise _MisfitError
    if whole and isinstance(value, float):
        if not value.is_integer():
            raise _MisfitError
        return int(value)
    return value


def _read(value: Any, kind: type) -> Any:
    """A value, or that which its text is the JSON of."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _MisfitError from None
    if not isinstance(value, kind):
        raise _MisfitError
    return value


def _array(value: Any, schema: Mapping[str, Any], root: Any, level: int) -> Any:
    if isinstance(value, str):
        try:
            value = _read(value, list)
        except _MisfitError:
            value = [value]
    if value is None:
        raise _MisfitError
    items = value if isinstance(value, list) else [value]
    made = [_fit(item, schema.get("items"), root, level) for item in items]
    return _limited(made, list_fits, schema)


def _object(value: Any, schema: Mapping[str, Any], root: Any, level: int) -> Any:
    properties, required = schema.get("properties"), schema.get("required")
    known = properties if isinstance(properties, Mapping) else {}
    needed = required if isinstance(required, list) else []
    others = schema.get("additionalProperties")
    made = {}
    for name, item in value.items():
        try:
            made[name] = _fit(item, known.get(name, others), root, level)
        except _MisfitError:
            if item is not None or name in needed or name not in known:
                raise
    if any(name not in made for name in needed):
        raise _MisfitError
    return made
