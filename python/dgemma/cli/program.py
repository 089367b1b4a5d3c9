"""Reads the command line, runs a command, and turns errors into one line and an exit code."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from .. import progress
from .._native import version
from ..errors import Error
from . import (
    batch,
    bench,
    chat,
    doctor,
    evaluate,
    generate,
    imatrix,
    inspect,
    run_model,
    serve,
)
from .plugins import add_plugins

DONE, FAILED, INTERRUPTED = 0, 1, 130  # wrong usage is 2: argparse's own
DEBUG = "DGEMMA_DEBUG"
"""With this variable set, an error that nobody expected shows where it came from."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; a command's function is its `run`."""
    top = argparse.ArgumentParser(
        prog="dgemma",
        description="Run DiffusionGemma, a block text-diffusion language model, on this machine.",
    )
    top.add_argument("--version", action="version", version=f"dgemma {version()}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run_model.add_parser(commands)
    imatrix.add_parser(commands)
    inspect.add_parser(commands)
    generate.add_parser(commands)
    chat.add_parser(commands)
    serve.add_parser(commands)
    batch.add_parser(commands)
    bench.add_parser(commands)
    evaluate.add_parser(commands)
    doctor.add_parser(commands)
    add_plugins(commands)
    return top


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    if sys.stderr is None:  # closed: what is meant for it must not go to standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        args = parser().parse_args(arguments)
    except BrokenPipeError:  # of `--help`
        return _gave_up_writing(DONE)
    except KeyboardInterrupt:  # while the packages of other commands are imported
        return INTERRUPTED
    with _interrupts() as interrupts:
        try:
            code = _run_command(args)
        except KeyboardInterrupt:
            code = INTERRUPTED
    return INTERRUPTED if interrupts.seen and code == FAILED else code


def _run_command(args: argparse.Namespace) -> int:
    try:
        if sys.stdout is None:
            raise Error("standard output is closed: redirect it to /dev/null to see nothing")
        with progress.shown(getattr(args, "progress", None)):
            code = args.run(args)
        sys.stdout.flush()
        return DONE if code is None else int(code)
    except BrokenPipeError:
        return _gave_up_writing(DONE)  # the reader has enough, as `head` does
    except MemoryError:
        return _failed("not enough memory")
    except RecursionError:
        return _failed("something given is nested too deeply")
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) and problem.filename is None:
            return _gave_up_writing(_failed(f"writing failed: {problem.strerror}"))
        return _failed(str(problem) or type(problem).__name__)
    except (Error, ImportError, TypeError, ValueError, OverflowError) as problem:
        return _failed(str(problem) or type(problem).__name__)
    except SystemExit as end:
        # Libraries leave with codes of their own.
        return end.code if isinstance(end.code, int) and end.code in (DONE, FAILED, 2) else FAILED
    except Exception as problem:
        return _failed(
            f"{type(problem).__name__}: {problem} (this is a bug of dgemma; {DEBUG}=1 shows where)"
        )


def _failed(message: str) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    # A name in the message may hold bytes that are no text, and standard error may be strict.
    message = message.encode(errors="backslashreplace").decode()
    print(f"dgemma: error: {' '.join(message.split())}", file=sys.stderr)
    return FAILED


def _gave_up_writing(code: int) -> int:
    """Python would try to write the rest when it exits, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


class _Interrupts:
    """Whether Ctrl-C was pressed, also where the exception got lost on its way."""

    def __init__(self) -> None:
        self.seen = False

    def on_signal(self, *_: object) -> None:
        self.seen = True
        raise KeyboardInterrupt

    @staticmethod
    def on_lost(lost: Any) -> None:
        """Python only prints what is raised in destructors: raises it again, outside of them."""
        if lost.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, _thread.interrupt_main).start()
        else:
            sys.__unraisablehook__(lost)


@contextlib.contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    found = _Interrupts()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield found
        return
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, found.on_signal)
    sys.unraisablehook = found.on_lost
    try:
        yield found
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, signal.default_int_handler)
