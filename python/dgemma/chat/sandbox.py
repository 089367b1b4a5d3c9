"""Renders templates that come out of model files, and may be hostile, within bounds.

jinja2's immutable sandbox keeps a template away from Python. What it does not bound is time and
memory, so here every loop, call, filter and joined text checks a deadline, and every value that
passes through them is weighed.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ChatTemplateError

MAX_SECONDS = 5.0
MAX_WEIGHT = 16 * 2**20  # of one value: characters, and 16 for each element; also of the output
# What chat templates use. The rest of jinja2's filters are for web pages, and some are slow.
# fmt: off
FILTERS = (
    "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape",
    "first", "float", "groupby", "indent", "int", "items", "join", "last", "length", "list",
    "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round",
    "safe", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim",
    "unique", "upper",
)
# fmt: on
_WIDE_FIELD = re.compile(r"\d{5}|\*")  # "%99999d" asks for memory without a large argument


def _refuse(what: str) -> ChatTemplateError:
    return ChatTemplateError(f"the chat template {what}; it does not look like a real template")


def weigh(value: Any) -> None:
    """Raises where a value, however nested, is heavier than MAX_WEIGHT."""
    weight, pending = 0, [value]
    while pending:
        item = pending.pop()
        weight += 16
        if isinstance(item, str | bytes):
            weight += len(item)
        elif isinstance(item, int):
            weight += item.bit_length() // 4
        elif isinstance(item, Mapping):
            weight += 16 * len(item)
            pending.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            weight += 16 * len(item)
            pending.extend(item)
        if weight > MAX_WEIGHT:
            raise _refuse("makes a value that is too large")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a deadline and a weight limit; `deadline` is set before each rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    deadline = 0.0

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            finalize=self._finalize,
        )
        self.filters = {name: self._bounded(self.filters[name]) for name in FILTERS}
        self.filters["bounded_loop"] = self._loop
        self.filters["bounded_text"] = self._finalize
        for unused in ("lipsum", "cycler", "joiner"):
            del self.globals[unused]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise _refuse(f"takes longer than {MAX_SECONDS:g} seconds")

    def _finalize(self, value: Any) -> Any:
        self.tick()
        weigh(value)
        return value

    def _loop(self, items: Any) -> _Ticking:
        self.tick()
        items = self._whole(items)
        weigh(items)
        return _Ticking(self, items)

    def _arguments(self, values: list[Any]) -> None:
        self.tick()
        for value in values:
            if isinstance(value, int) and abs(value) > MAX_WEIGHT:
                raise _refuse(f"asks for {value} characters or elements")
            weigh(value)
        # Replacing and joining can repeat one argument for every element of another.
        sizes = sorted((len(v) for v in values if hasattr(v, "__len__")), reverse=True)
        if len(sizes) > 1 and (sizes[0] + 1) * sizes[1] > 16 * MAX_WEIGHT:
            raise _refuse("joins values that are too large")

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        n_own = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja2's context or environment

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            values = [self._whole(value) for value in args[n_own:]]
            self._arguments([*values, *kwargs.values()])
            result = function(*args[:n_own], *values, **kwargs)
            weigh(result)
            return result

        return checked

    def _whole(self, value: Any) -> Any:
        """A generator's elements as a list, so that they can be weighed."""
        return list(_take(self, value)) if isinstance(value, Iterator) else value

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, method or macro of the template."""
        owner = getattr(__obj, "__self__", None)
        values = [self._whole(value) for value in args]
        own = [owner] if isinstance(owner, str) else []
        self._arguments([*own, *values, *kwargs.values()])
        result = super().call(__context, __obj, *values, **kwargs)
        weigh(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Guards `"…".format`, which jinja2 asks about at every access to a method of a text."""
        if getattr(value, "__name__", "") in ("format", "format_map"):
            self._format(str(value.__self__))
        return super().wrap_str_format(value)

    def _format(self, text: str) -> None:
        if _WIDE_FIELD.search(text):
            raise _refuse("formats text with a very wide field")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Applies an arithmetic operator."""
        self.tick()
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
            raise _refuse("raises to a very high power")
        if operator == "%" and isinstance(left, str):
            self._format(left)
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                repeats = isinstance(many, str | list | tuple) and isinstance(times, int)
                if repeats and len(many) * times > MAX_WEIGHT:
                    raise _refuse("repeats a value too often")
        result = super().call_binop(context, operator, left, right)
        weigh(result)
        return result

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "bounded_loop")
        for parent in list(tree.find_all(nodes.Node)):
            for field, value in parent.iter_fields():
                if isinstance(value, list):
                    value[:] = [_bounded_text(item) for item in value]
                else:
                    setattr(parent, field, _bounded_text(value))
        return tree


class _Ticking:
    """Elements that check the deadline as they are taken; sized, because `loop.last` asks."""

    def __init__(self, environment: _Environment, items: Any) -> None:
        self._environment, self._items = environment, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return _take(self._environment, self._items)


def _take(environment: _Environment, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        environment.tick()
        yield item


def _bounded_text(node: Any) -> Any:
    return _filtered(node, "bounded_text") if isinstance(node, nodes.Concat) else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _raise_exception(message: object) -> None:
    raise ChatTemplateError(f"the chat template refuses these messages: {message}")


def _strftime_now(format: str) -> str:
    if _WIDE_FIELD.search(format) or len(format) > 200:
        raise _refuse("formats a date oddly")
    return time.strftime(format)


class Template:
    """One template; ChatTemplateError where it cannot be read or rendered."""

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        self._lock = threading.Lock()  # the deadline belongs to one rendering at a time
        try:
            weigh(source)
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as problem:
            raise ChatTemplateError(f"the chat template cannot be read: {problem}") from problem

    def render(self, **variables: Any) -> str:
        """The text for these variables."""
        with self._lock:
            self._environment.deadline = time.monotonic() + MAX_SECONDS
            pieces, size = [], 0
            try:
                for piece in self._template.generate(**variables):
                    size += len(piece)
                    if size > MAX_WEIGHT:
                        raise _refuse(f"writes more than {MAX_WEIGHT} characters")
                    pieces.append(piece)
            except ChatTemplateError:
                raise
            except MemoryError as problem:
                raise _refuse("needs too much memory") from problem
            except Exception as problem:  # a template can fail in any way that an expression can
                raise ChatTemplateError(
                    f"the chat template does not work with these messages: {problem}"
                ) from problem
        return "".join(pieces)
