"""Several conversations over one model: which of their caches a prompt goes on from.

A cache is worth keeping while its conversation may come back. A prompt takes the session in which
the least work is lost: what it must encode anew, and what it cuts off there that another turn may
ask for again. So a second turn finds its first, and a conversation that only shares the beginning
with another one, a system prompt perhaps, does not push it out while there is room.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .._native import Session, token_ids
from ..errors import OutOfMemoryError
from ..values import IdArray, Ids, Memory


@dataclass
class Slot:
    """One session of a pool. `used` counts up: the least recently used has the lowest."""

    id: int
    session: Session
    tokens: IdArray = field(default_factory=lambda: np.zeros(0, np.int32))  # that it holds
    busy: bool = False
    used: int = 0


class SessionPool:
    """Up to `n_sessions` sessions: the model's own first, others made when they are needed.

    Where memory does not suffice for another one, those there are have to do.
    """

    def __init__(self, first: Session, create: Callable[[], Session], n_sessions: int) -> None:
        if n_sessions < 1:
            raise ValueError(f"n_sessions is {n_sessions}: expected at least 1")
        self._create, self.n_sessions = create, n_sessions
        self._slots = [Slot(0, first)]
        self._clock = 0
        self._state = threading.Condition()

    @property
    def slots(self) -> list[Slot]:
        """The sessions that there are so far."""
        return self._slots

    @contextlib.contextmanager
    def held(self, prompt: Ids) -> Iterator[Session]:
        """The session for a prompt, for this caller alone; waits while all are taken."""
        ids = token_ids(prompt)
        with self._state:
            while (slot := self._chosen(ids)) is None:
                self._state.wait()
            slot.busy = True
        try:
            yield slot.session
        finally:
            with self._state:
                self._clock += 1
                slot.busy, slot.used = False, self._clock
                slot.tokens = slot.session.tokens
                self._state.notify()

    def _chosen(self, prompt: IdArray) -> Slot | None:
        """The slot in which the least is lost; None while all are busy."""
        free = [slot for slot in self._slots if not slot.busy]
        best = min(free, key=lambda slot: (_lost(slot, prompt), slot.used), default=None)
        if best is not None and _lost(best, prompt) < len(prompt):
            return best
        # To begin anew is the cheapest: in a new session, or in the one unused for longest.
        return self._grown() or min(free, key=lambda slot: slot.used, default=None)

    def _grown(self) -> Slot | None:
        unused = [slot for slot in self._slots if not slot.busy and not len(slot.tokens)]
        if unused:
            return unused[0]
        if len(self._slots) >= self.n_sessions:
            return None
        try:
            session = self._create()
        except OutOfMemoryError:
            self.n_sessions = len(self._slots)
            return None
        self._slots.append(Slot(len(self._slots), session))
        return self._slots[-1]


def _lost(slot: Slot, prompt: IdArray) -> int:
    """Tokens to encode anew, and tokens cut off, where a prompt goes on from a slot."""
    n_common = common_prefix(slot.tokens, prompt)
    n_cut = len(slot.tokens) - n_common
    if n_cut > slot.session.n_rewind:
        n_common = 0  # the sliding layers cannot go back so far: all would be forgotten
    return len(prompt) - n_common + n_cut


def common_prefix(one: IdArray, other: IdArray) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(one), len(other))
    differs = np.nonzero(one[:n] != other[:n])[0]
    return int(differs[0]) if len(differs) else n


def sessions_within(n_bytes: int, memory: Memory) -> int:
    """How many sessions fit beside each other into a budget, by what each takes; at least one."""
    return max(1, n_bytes // memory.session)
