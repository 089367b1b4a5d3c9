"""jinja2 as chat templates expect it: what `transformers` adds, and texts that carry stand-ins.

Runs in the worker. The immutable sandbox keeps a template away from Python; time and memory are
bounded by the process around it. Operations on texts work as if every stand-in (see `marks.py`)
were the character that it stands for, and keep it in what they return.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, escape

from ..errors import ChatTemplateError
from ..marks import mapped, translated

_CUTTING = frozenset(("split", "rsplit", "partition", "rpartition"))
_STRIPPING = frozenset(("strip", "lstrip", "rstrip", "removeprefix", "removesuffix"))
_ASKING = frozenset((
    *("count", "find", "rfind", "index", "rindex", "startswith", "endswith"),
    *("isalnum", "isalpha", "isascii", "isidentifier", "isprintable", "istitle"),
))  # fmt: skip
_OF_JINJA = ("_loop_vars", "_block_vars")  # what it passes along with the arguments of every call


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox; `symbols` says what stands for what in the values of one rendering."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self.symbols: Mapping[str, str] = {}
        self.filters["tojson"] = self._tojson
        self.filters["escape"] = self.filters["e"] = self._escape
        self.filters["replace"] = lambda text, *args, **kw: self._method(text, "replace", args, kw)
        self.filters["trim"] = lambda text, *args, **kw: self._method(text, "strip", args, kw)
        self.filters["read_as"] = self._plain
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._asks(test) for name, test in tests.items()}
        self.globals["raise_exception"] = self._raise_exception
        self.globals["strftime_now"] = time.strftime

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, method or macro of the template."""
        owner = getattr(__obj, "__self__", None)
        if self.symbols and isinstance(owner, str):
            name = getattr(__obj, "__name__", "")
            if name in _CUTTING | _STRIPPING | _ASKING or name == "replace":
                given = {k: v for k, v in kwargs.items() if k not in _OF_JINJA}
                return self._method(owner, name, args, given)
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for compared in tree.find_all(nodes.Compare):
            compared.expr = _read_as(compared.expr)
            for operand in compared.ops:
                operand.expr = _read_as(operand.expr)
        return tree

    def _plain(self, value: Any) -> Any:
        """A value to compare, with what its stand-ins stand for."""
        if not self.symbols or not isinstance(value, str | list | tuple | dict):
            return value
        return mapped(value, lambda text: translated(text, self.symbols))

    def _asks(self, test: Callable[..., Any]) -> Callable[..., Any]:
        n_own = 1 if hasattr(test, "jinja_pass_arg") else 0  # jinja2's context or environment

        @functools.wraps(test)
        def asked(*args: Any, **kwargs: Any) -> Any:
            return test(*args[:n_own], *map(self._plain, args[n_own:]), **kwargs)

        return asked

    def _method(self, owner: Any, name: str, args: Any, kwargs: Any) -> Any:
        owner = owner if isinstance(owner, str) else str(owner)
        if not self.symbols:
            return getattr(owner, name)(*args, **kwargs)
        text = translated(owner, self.symbols)
        plain = [self._plain(value) for value in args]
        if name == "replace":
            return _replaced(owner, text, plain[0], args[1], *args[2:], **kwargs)
        found = getattr(text, name)(*plain, **{k: self._plain(v) for k, v in kwargs.items()})
        if name in _CUTTING:
            separator = plain[0] if plain else kwargs.get("sep")
            return _cut(owner, text, found, separator if "split" in name else "")
        if name in _STRIPPING:
            left = 0
            if name in ("lstrip", "removeprefix"):
                left = len(text) - len(found)
            elif name == "strip":
                left = len(text) - len(text.lstrip(*plain, **kwargs))
            return owner[left : left + len(found)]
        return found

    def _tojson(self, value: Any, ensure_ascii: bool = False, indent: Any = None,
                separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
        """As `transformers` has it: nothing is escaped for web pages."""
        written = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                             separators=separators, sort_keys=sort_keys)  # fmt: skip
        if ensure_ascii:
            for symbol in self.symbols:
                written = written.replace(json.dumps(symbol)[1:-1], symbol)
        return written

    def _escape(self, value: Any) -> Markup:
        escaped = escape(value)
        for symbol, character in self.symbols.items():
            entity = escape(character)
            if entity != character:
                escaped = escaped.replace(symbol, entity)
        return escaped

    def _raise_exception(self, message: object) -> None:
        told = translated(str(message), self.symbols)
        raise ChatTemplateError(f"the chat template refuses these messages: {told}")


class _Generation(Extension):
    """`{% generation %}` marks, for training, what the assistant writes: here, its body counts."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, as a block that is called at once."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _read_as(node: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, "read_as", [], [], None, None, lineno=node.lineno)


def _cut(owner: str, text: str, pieces: Any, separator: str | None) -> Any:
    """The parts of `owner` that stand where these pieces, in order, stand in `text`."""
    found, at = [], 0
    for piece in pieces:
        at = text.index(piece, at)
        found.append(owner[at : at + len(piece)])
        at += len(piece) + len(separator or "")
    return type(pieces)(found)


def _replaced(owner: str, text: str, old: str, new: str, count: Any = None) -> str:
    count = -1 if count is None else count
    if not old:
        return owner.replace(old, new, count)
    return new.join(_cut(owner, text, text.split(old, count), old))
