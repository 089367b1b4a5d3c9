"""The program `dgemma`."""

from __future__ import annotations

# Python's own `signal` imports more, and until it is there Ctrl-C is a traceback.
import _signal  # type: ignore[import-not-found]
import os

TYPE_CHECKING = False  # nor is this imported
if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    # Importing takes a moment. KeyboardInterrupt would come out of the middle of some package,
    # which may take it for a reason to go on without a part of its own.
    before = _signal.getsignal(_signal.SIGINT)
    watched = before is _signal.default_int_handler
    if watched:
        try:
            _signal.signal(_signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        except ValueError:  # a thread, which is not interrupted
            watched = False
    try:
        from .program import run
    finally:
        if watched:
            _signal.signal(_signal.SIGINT, before)
    return run(arguments)


__all__ = ["main"]
