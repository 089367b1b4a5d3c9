"""Renders templates that come out of model files, and may be hostile, in a process of their own.

jinja2's sandbox keeps a template away from Python, but not from powers, paddings and loops that
take all time and memory there is. So it is rendered by a worker that may use MAX_BYTES and has
MAX_SECONDS: one that takes longer, or dies, is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ChatTemplateError
from ..marks import MarkedText, delimiters, protect
from .worker import Renderer, frame

MAX_SECONDS = 5.0
START_SECONDS = 60.0  # to start Python and jinja2, on a machine that does much else
MAX_BYTES = 512 * 2**20  # of the worker's address space
MAX_SIZE = 16 * 2**20  # characters of what a template writes
_MAX_FRAME = 16 * MAX_SIZE

# Makes the packages around the worker without running what is in them, which loads the engine.
_START = """
import json, runpy, sys, types
folder, path = sys.argv[2], json.loads(sys.argv[3])
sys.path[:] = path
for name, place in (("dgemma", folder), ("dgemma.chat", folder + "/chat")):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [place]
runpy.run_module("dgemma.chat.worker", run_name="__main__")
"""
_ENVIRONMENT = ("TZ", "LANG", "LC_ALL", "LC_TIME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class Template:
    """One template; ChatTemplateError where it cannot be read or rendered.

    `control_tokens`: what its values may spell out without meaning it.
    """

    def __init__(self, source: str, control_tokens: Iterable[str] = ()) -> None:
        self._source = source
        self._delimiters = delimiters(control_tokens)
        self._lock = threading.Lock()  # one rendering at a time
        self._worker: _Worker | _Here | None = None
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

    def _ready(self) -> _Worker | _Here:
        """The worker, with the template in it."""
        if self._worker is None or not self._worker.usable():
            self._worker = _Worker() if _can_start() else _Here()
            self._asked(self._worker, {"source": self._source}, MAX_SECONDS)
        return self._worker

    def _asked(self, worker: _Worker | _Here, value: Any, seconds: float) -> str:
        try:
            answer = worker.ask(value, seconds)
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


def _can_start() -> bool:
    """Whether `sys.executable` is Python: in a program made into one file it is that program."""
    return bool(sys.executable) and not getattr(sys, "frozen", False) and os.name == "posix"


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


class _Worker:
    """The process, and the two pipes to it."""

    def __init__(self) -> None:
        folder = str(Path(__file__).parent.parent)
        path = [os.path.abspath(entry) for entry in sys.path]
        # fmt: off
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, str(MAX_BYTES), folder, json.dumps(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        # fmt: on
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, self._process, self._owner)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._started = False

    def usable(self) -> bool:
        """Whether it runs, and belongs to this process and not to the one that was forked."""
        return self._owner == os.getpid() and self._process.poll() is None

    def end(self) -> None:
        """Kills it."""
        self._end()

    def ask(self, value: Any, seconds: float) -> Any:
        """What it answers; ChatTemplateError where that takes too long or does not come."""
        if not self._started:
            self._exchange(frame({"source": ""}), START_SECONDS, "did not start")
            self._started = True
        return self._exchange(
            frame(value), seconds,
            f"takes longer than {seconds:g} seconds; it does not look like a real template",
        )  # fmt: skip

    def _exchange(self, data: bytes, seconds: float, late: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        sending, answer, wanted = memoryview(data), bytearray(), 8
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdin, selectors.EVENT_WRITE)
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while len(answer) < wanted:
                events = ready.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise ChatTemplateError(f"the chat template {late}")
                for key, _ in events:
                    if key.fileobj is self._process.stdin:
                        with contextlib.suppress(BrokenPipeError):
                            sending = sending[os.write(key.fd, sending[:65536]) :]
                        if not sending:
                            ready.unregister(key.fileobj)
                        continue
                    read = os.read(key.fd, 1 << 20)
                    if not read:
                        raise ChatTemplateError("the chat template ended the process that ran it")
                    answer += read
                    if wanted == 8 and len(answer) >= 8:
                        wanted = 8 + int.from_bytes(answer[:8], "little")
                        if wanted > _MAX_FRAME:
                            raise ChatTemplateError("the chat template writes too much")
        return json.loads(answer[8:])


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
