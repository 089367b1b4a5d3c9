"""Grammars of requests, made where they can do no harm.

llguidance walks a schema by calling itself, and a chain of references that is long enough overruns
the stack, which ends the process. So the depth of a schema is bounded first. Then a worker makes
the grammar, with less stack than this process gives it: what ends the worker is an error here.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from ..errors import OptionTypeError, OptionValueError
from ..workers import Worker, WorkerError, can_start

MAX_GRAMMAR = 2**20  # characters
MAX_NESTING = 100  # of a schema's objects and lists
MAX_LEVELS = 4000  # nesting, summed over what is referred to: no path through a schema is longer
MAX_SECONDS = 10.0
MAX_BYTES = 2**30
_STACK = 256 * 2**20  # reserved, not used: a level takes about 20 KB
_WORKERS_STACK = _STACK // 2
# Between the tokens of JSON: a space, or a new line with its indentation. More is valid too, but a
# canvas that has nothing to say would fill up with it.
_WHITESPACE = r"( ?|\n {0,40})"

_lock = threading.Lock()
_worker: Worker | None = None


def schema_grammar(schema: Any, param: str) -> str:
    """The grammar of a JSON schema, as a text.

    Errors: OptionTypeError, OptionValueError, with `param`.
    """
    if not isinstance(schema, Mapping):
        raise OptionTypeError("a JSON schema must be an object", param=param)
    check_depth(schema, param)
    settings = {"x-guidance": {"whitespace_pattern": _WHITESPACE}}
    try:
        text = json.dumps({**schema, **settings}, default=str)
    except ValueError as problem:  # numbers with too many digits
        raise OptionValueError(f"the JSON schema cannot be read: {problem}", param=param) from None
    if len(text) > MAX_GRAMMAR:
        raise OptionValueError(
            f"the JSON schema has {len(text)} characters: at most {MAX_GRAMMAR}", param=param
        )
    return str(LLMatcher.grammar_from_json_schema(text))


def check_depth(schema: Mapping[str, Any], param: str) -> None:
    """Raises OptionValueError for schemas that are nested, or refer on, too deeply."""
    nesting, references = _measured(schema)
    if nesting > MAX_NESTING:
        raise OptionValueError(
            f"the JSON schema is nested more than {MAX_NESTING} deep: use $defs", param=param
        )
    levels = nesting
    for reference in references:
        levels += _measured(target(schema, reference))[0] + 1
    if levels > MAX_LEVELS:
        raise OptionValueError(
            f"the JSON schema has {len(references)} references, which lead through {levels} "
            f"levels: at most {MAX_LEVELS}",
            param=param,
        )


def _measured(schema: Any) -> tuple[int, set[str]]:
    """How deep a value is nested, at most a little beyond the limit, and what it refers to."""
    deepest, references, pending = 0, set(), [(schema, 0)]
    while pending and deepest <= MAX_NESTING:
        item, level = pending.pop()
        deepest = max(deepest, level)
        if isinstance(item, Mapping):
            for key in ("$ref", "$dynamicRef", "$recursiveRef"):
                if isinstance(item.get(key), str):
                    references.add(item[key])
            pending.extend((value, level + 1) for value in item.values())
        elif isinstance(item, list | tuple):
            pending.extend((value, level + 1) for value in item)
    return deepest, references


def target(schema: Any, reference: str) -> Any:
    """What a reference points at; the whole schema where that cannot be told."""
    found = schema
    for step in reference.removeprefix("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            return schema
    return found


def matcher(grammar: str, param: str) -> Any:
    """A matcher whose tokens are bytes: the model's own tokens are checked by what they spell."""
    problem = _problem(grammar)
    made, problem = (None, problem) if problem else _on_a_stack(grammar, _STACK)
    if problem:
        raise OptionValueError(f"the form of the answer cannot be checked: {problem}", param=param)
    return made


def _on_a_stack(grammar: str, n_bytes: int) -> tuple[Any, str]:
    """A matcher, and what is wrong with its grammar, made by a thread with a stack of this size."""
    found: list[Any] = []

    def make() -> None:
        try:
            found.append(LLMatcher(LLTokenizer("byte"), grammar, log_level=0))
        except Exception as problem:  # what the library raises of its own has no common class
            found.append(problem)

    before = threading.stack_size(n_bytes)
    try:
        thread = threading.Thread(target=make)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if isinstance(found[0], Exception):
        return None, str(found[0])
    return found[0], str(found[0].get_error())


@functools.lru_cache(maxsize=64)
def _problem(grammar: str) -> str:
    """What is wrong with a grammar, "" for nothing; a worker finds out."""
    global _worker
    if not can_start():
        return ""
    with _lock:
        if _worker is None or not _worker.usable():
            _worker = Worker("dgemma.generation.grammars", MAX_BYTES)
        try:
            return str(_worker.ask({"grammar": grammar}, MAX_SECONDS)["error"])
        except WorkerError as problem:
            _worker.end()
            _worker = None
            return f"making its grammar failed, {problem}: ask for a simpler form"
        except BaseException:  # Ctrl-C: its answer would be taken for that to the next question
            _worker.end()
            _worker = None
            raise


def answer(asked: dict[str, str]) -> dict[str, str]:
    """In the worker: what is wrong with a grammar."""
    return {"error": _on_a_stack(asked["grammar"], _WORKERS_STACK)[1]}
