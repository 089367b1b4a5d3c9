"""Renders templates that come out of model files, and may be hostile, in a process of their own.

jinja2's sandbox keeps a template away from Python, but not from powers, paddings and loops that
take all time and memory there is. So it is rendered by a worker that may use MAX_BYTES and has
MAX_SECONDS: one that takes longer, or dies, is replaced.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ChatTemplateError
from ..marks import MarkedText, delimiters, protect
from ..workers import Worker, WorkerError, can_start
from .renderer import Renderer

MAX_SECONDS = 5.0
MAX_BYTES = 512 * 2**20  # of the worker's address space
MAX_SIZE = 16 * 2**20  # characters of what a template writes


class Template:
    """One template; ChatTemplateError where it cannot be read or rendered.

    `control_tokens`: what its values may spell out without meaning it.
    """

    def __init__(self, source: str, control_tokens: Iterable[str] = ()) -> None:
        self._source = source
        self._delimiters = delimiters(control_tokens)
        self._lock = threading.Lock()  # one rendering at a time
        self._worker: Worker | _Here | None = None
        with self._lock:
            self._ready()

    def render(self, values: Mapping[str, Any] | None = None, /, **variables: Any) -> MarkedText:
        """The text for these variables.

        `values` come from outside, the keyword arguments from the file: only in the former do
        control tokens mean nothing.
        """
        known = f"{self._source}{variables}"
        own, symbols = protect(values or {}, self._delimiters, known)
        asked = {"variables": {**variables, **own}, "symbols": symbols, "max_size": MAX_SIZE}
        # A template that uses its time up must not keep every thread of a server waiting.
        if not self._lock.acquire(timeout=4 * MAX_SECONDS):
            raise ChatTemplateError("the chat template is too slow for so many conversations")
        try:
            return MarkedText(self._asked(self._ready(), asked, MAX_SECONDS), symbols)
        finally:
            self._lock.release()

    def text(self, text: str) -> MarkedText:
        """A text from outside, to be put behind what the template wrote."""
        values, symbols = protect({"messages": text}, self._delimiters)
        return MarkedText(values["messages"], symbols)

    def _ready(self) -> Worker | _Here:
        """The worker, with the template in it."""
        if self._worker is None or not self._worker.usable():
            self._worker = Worker("dgemma.chat.renderer", MAX_BYTES) if can_start() else _Here()
            self._asked(self._worker, {"source": self._source}, MAX_SECONDS)
        return self._worker

    def _asked(self, worker: Worker | _Here, value: Any, seconds: float) -> str:
        try:
            answer = worker.ask(value, seconds)
        except WorkerError as problem:
            worker.end()
            self._worker = None
            told = str(problem).removeprefix("it ")
            raise ChatTemplateError(
                f"the chat template {told}; it does not look like a real template"
            ) from None
        except BaseException:  # also Ctrl-C: what it would answer next belongs to this question
            worker.end()
            self._worker = None
            raise
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            if "source" in value:
                worker.end()
                self._worker = None
            raise ChatTemplateError(str(answer["error"]))
        return str(answer["text"])


class _Here:
    """In place of a worker where none can be started: nothing bounds the template's time."""

    def __init__(self) -> None:
        self._renderer = Renderer()

    def usable(self) -> bool:
        return True

    def ask(self, value: Any, _: float) -> Any:
        value = json.loads(json.dumps(value))
        if "source" in value:
            return self._renderer.compile(value["source"])
        return self._renderer.render(value["variables"], value["symbols"], value["max_size"])

    def end(self) -> None:
        pass
