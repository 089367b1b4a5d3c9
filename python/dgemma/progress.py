"""Progress bars on standard error, shown only on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_shown: bool | None = None  # None: on a terminal


@contextlib.contextmanager
def shown(choice: bool | None) -> Iterator[None]:
    """Shows bars anywhere (True), nowhere (False), or on terminals (None) meanwhile."""
    global _shown
    before, _shown = _shown, choice
    try:
        yield
    finally:
        _shown = before


class Bar:
    """A bar under way: `update` counts further ones, `share` says how much of all is done."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, n: float = 1, **notes: object) -> None:
        """Counts `n` further ones; `notes` stand behind the bar."""
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        self._bar.update(n)

    def reach(self, n: float, *, total: float | None = None, **notes: object) -> None:
        """Says how many are done by now, and of how many where that was not known before."""
        if total is not None:
            self._bar.total = total
        self.update(n - self._bar.n, **notes)

    def share(self, done: float) -> None:
        """Says which share of all, in [0, 1], is done by now."""
        self.reach(int(done * (self._bar.total or 0)))


@contextlib.contextmanager
def progress_bar(
    what: str,
    total: float = 100,
    *,
    unit: str = "%",
    enabled: bool | None = None,
    in_bytes: bool = False,
) -> Iterator[Bar]:
    """A bar for `total` of `unit`, taken away in the end.

    `enabled`: False shows none, anything else one where standard error is a terminal. `in_bytes`:
    the numbers are bytes, written as sizes.
    """
    bar = tqdm(
        total=total,
        desc=what,
        unit="B" if in_bytes else unit,
        unit_scale=in_bytes,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
        disable=enabled is False or not _wanted(),
    )
    try:
        yield Bar(bar)
    finally:
        bar.close()


def _wanted() -> bool:
    if _shown is not None:
        return _shown
    return sys.stderr is not None and sys.stderr.isatty()
