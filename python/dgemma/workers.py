"""Processes for what a file or a request could use to take all time, memory or stack there is.

A worker is Python with one module of this package and little else. It bounds itself, answers framed
JSON, and is killed and replaced where it takes too long or dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

START_SECONDS = 60.0  # to start Python and import, on a machine that does much else
MAX_FRAME = 2**28
CPU_SECONDS = 30  # of one answer, should nobody be left to end the process

# Makes the packages around the module without running what is in them, which loads the engine.
_START = """
import importlib, json, sys, types
module, max_bytes, folder, path = sys.argv[1:]
sys.path[:] = json.loads(path)
parts = module.split(".")[:-1]
for n in range(1, len(parts) + 1):
    package = sys.modules[".".join(parts[:n])] = types.ModuleType(".".join(parts[:n]))
    package.__path__ = ["/".join([folder, *parts[1:n]])]
from dgemma.workers import serve
serve(importlib.import_module(module).answer, int(max_bytes))
"""
_ENVIRONMENT = ("TZ", "LANG", "LC_ALL", "LC_TIME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class WorkerError(Exception):
    """The worker did not answer; `late` where it took too long."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


def can_start() -> bool:
    """Whether `sys.executable` is Python: in a program made into one file it is that program."""
    return bool(sys.executable) and not getattr(sys, "frozen", False) and os.name == "posix"


class Worker:
    """A process that answers with a module's `answer`, and the two pipes to it.

    `max_bytes`: of its address space.
    """

    def __init__(self, module: str, max_bytes: int) -> None:
        folder = str(Path(__file__).parent)
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        # fmt: off
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, module, str(max_bytes), folder, path],
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
        """What it answers; WorkerError where that takes too long or does not come."""
        if not self._started:
            self._exchange(_frame(None), START_SECONDS)
            self._started = True
        return self._exchange(_frame(value), seconds)

    def _exchange(self, data: bytes, seconds: float) -> Any:
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
                    raise WorkerError(f"it takes longer than {seconds:g} seconds", late=True)
                for key, _ in events:
                    if key.fileobj is self._process.stdin:
                        with contextlib.suppress(BrokenPipeError):
                            sending = sending[os.write(key.fd, sending[:65536]) :]
                        if not sending:
                            ready.unregister(key.fileobj)
                        continue
                    read = os.read(key.fd, 1 << 20)
                    if not read:
                        raise WorkerError("it ended the process that worked on it")
                    answer += read
                    if wanted == 8 and len(answer) >= 8:
                        wanted = 8 + int.from_bytes(answer[:8], "little")
                        if wanted > MAX_FRAME:
                            raise WorkerError("it writes too much")
        return json.loads(answer[8:])


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()


# ---- Inside the process --------------------------------------------------------------------------


def serve(answer: Callable[[Any], Any], max_bytes: int) -> None:
    """Answers until the input ends."""
    import resource

    limits = {resource.RLIMIT_AS: max_bytes, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not know all of them
            resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which ends this one
    reader, writer = sys.stdin.buffer, sys.stdout.buffer
    while len(head := reader.read(8)) == 8:
        asked = _read(reader, int.from_bytes(head, "little"))
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        try:
            data = _frame(None if asked is None else answer(asked))
        except MemoryError:
            data = _frame({"error": "it needs too much memory"})
        writer.write(data)
        writer.flush()


def _read(stream: BinaryIO, n: int) -> Any:
    return json.loads(stream.read(n))


def _frame(value: Any) -> bytes:
    """A value as JSON with its length before it."""
    data = json.dumps(value).encode()
    return len(data).to_bytes(8, "little") + data
