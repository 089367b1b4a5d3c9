"""Whose turn it is with a session: one answer is made at a time, and a forgotten one ends.

An answer is made by many calls, as its reader asks for more. Others wait for it to end. But a
reader may never come back, and then the next answer takes over: what was read stays read, and a
reader that does come back is told.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Generator
from typing import TypeVar

from .._native import Session
from ..errors import CancelledError, Error

FORGOTTEN_SECONDS = 10.0  # without its reader asking for more, while another answer waits

T = TypeVar("T")


class _Turn:
    """One answer's hold on a session, from its first event to its last."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._thread = threading.current_thread()  # the last one that asked for an event
        self._working = False
        self._asked = time.monotonic()

    def begin(self) -> None:
        """Waits until the session is free, or its answer forgotten."""
        state, looked = self._session.turns, False
        with state:
            while (other := self._session.turn) is not None:
                if other._is_forgotten():
                    break
                if not looked:
                    looked = True
                    gc.collect()  # a stream that nobody can reach any more ends here
                    continue
                state.wait(0.1)
            self._session.turn = self

    def _is_forgotten(self) -> bool:
        mine = self._thread is threading.current_thread()
        if self._working:
            if mine:
                raise Error("this session is busy with the answer that is asking: use another one")
            return False
        idle = time.monotonic() - self._asked
        return mine or not self._thread.is_alive() or idle > FORGOTTEN_SECONDS

    def __enter__(self) -> None:
        with self._session.turns:
            if self._session.turn is not self:
                raise CancelledError(
                    "this stream was left half-read, and another answer was asked of its session: "
                    "read it to its end first, or use a session for each"
                )
            self._working, self._thread = True, threading.current_thread()

    def __exit__(self, *_: object) -> None:
        with self._session.turns:
            self._working, self._asked = False, time.monotonic()

    def end(self) -> None:
        """Lets the next one have the session."""
        with self._session.turns:
            if self._session.turn is self:
                self._session.turn = None
                self._session.turns.notify_all()


def in_turn(session: Session, events: Generator[T, None, None]) -> Generator[T, None, None]:
    """The events, while no other answer is made by the session."""
    turn = _Turn(session)
    turn.begin()
    try:
        session.resume()  # a cancellation that came too late was for an earlier answer
        while True:
            with turn:
                event = next(events, None)
            if event is None:
                return
            yield event
    finally:
        events.close()
        turn.end()
