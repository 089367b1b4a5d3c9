"""The program `dgemma`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    if threading.current_thread() is not threading.main_thread():
        from .program import run

        return run(arguments)
    # Importing takes a moment. KeyboardInterrupt would come out of the middle of some package,
    # which may take it for a reason to go on without a part of its own.
    before = signal.getsignal(signal.SIGINT)
    watched = before is signal.default_int_handler
    if watched:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        from .program import run
    finally:
        if watched:
            signal.signal(signal.SIGINT, before)
    return run(arguments)


__all__ = ["main"]
