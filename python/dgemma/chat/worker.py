"""The process that renders a template out of a model file: it reads and writes framed JSON.

It is started by `sandbox.py`, bounds itself, and holds nothing but jinja2. The first frame is the
template, every other one the variables of a rendering.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from typing import Any, BinaryIO

import jinja2

from ..errors import ChatTemplateError
from ..marks import translated
from .environment import Environment

CPU_SECONDS = 30  # of one rendering, should nobody be left to end this process


def read_frame(stream: BinaryIO) -> Any:
    """The next value; None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return json.loads(stream.read(int.from_bytes(head, "little")))


def frame(value: Any) -> bytes:
    """A value with its length before it."""
    data = json.dumps(value).encode()
    return len(data).to_bytes(8, "little") + data


class Renderer:
    """One template, compiled; the answers are {"text": …} or {"error": …}."""

    def __init__(self) -> None:
        self._environment = Environment()
        self._template: jinja2.Template | None = None

    def compile(self, source: str) -> dict[str, str]:
        """Reads the template."""
        try:
            self._template = self._environment.from_string(source)
        except MemoryError:
            return {"error": "the chat template cannot be read: it needs too much memory"}
        except Exception as problem:  # jinja2's own errors, and those of Python's compiler
            return {"error": f"the chat template cannot be read: {problem}"}
        return {"text": ""}

    def render(self, variables: dict[str, Any], symbols: dict[str, str], max_size: int) -> Any:
        """The text for these variables; `symbols` are their stand-ins."""
        assert self._template is not None
        self._environment.symbols = symbols
        pieces, size = [], 0
        try:
            for piece in self._template.generate(**variables):
                size += len(piece)
                if size > max_size:
                    return {"error": f"the chat template writes more than {max_size} characters; "
                                     "it does not look like a real template"}  # fmt: skip
                pieces.append(piece)
        except ChatTemplateError as problem:
            return {"error": str(problem)}
        except MemoryError:
            pieces.clear()
            return {"error": "the chat template needs too much memory; "
                             "it does not look like a real template"}  # fmt: skip
        except Exception as problem:  # a template can fail in any way that an expression can
            told = translated(str(problem), symbols)[:500]
            return {"error": f"the chat template does not work with these messages: {told}"}
        return {"text": "".join(pieces)}


def _bound(max_bytes: int) -> None:
    limits = {resource.RLIMIT_AS: max_bytes, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not know all of them
            resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which ends this one


def main(max_bytes: int) -> None:
    """Renders until its input ends."""
    reader, writer = sys.stdin.buffer, sys.stdout.buffer
    renderer = Renderer()
    _bound(max_bytes)
    while (asked := read_frame(reader)) is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        try:
            answer = frame(
                renderer.compile(asked["source"])
                if "source" in asked
                else renderer.render(asked["variables"], asked["symbols"], asked["max_size"])
            )
        except MemoryError:
            answer = frame({"error": "the chat template needs too much memory"})
        writer.write(answer)
        writer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
