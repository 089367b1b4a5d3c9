"""Work is handed out piece by piece, to whoever is free."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest


def _share(
    library: ctypes.CDLL, n_threads: int, n_items: int, n_held: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """What test_pool of tests/native/pool_api.c returns, who took each piece, and how often."""
    taken_by, times = np.full((2, n_items), -1, np.int32)
    arguments = (ctypes.c_void_p(a.ctypes.data) for a in (taken_by, times))
    status = library.test_pool(n_threads, n_items, n_held, *arguments)
    return status, taken_by, times


@pytest.mark.parametrize("n_threads", [1, 2, 6, 24])
@pytest.mark.parametrize("n_items", [1, 2, 64, 257])
def test_each_piece_is_done_once(kernel_library: ctypes.CDLL, n_threads: int, n_items: int) -> None:
    status, taken_by, times = _share(kernel_library, n_threads, n_items, 0)
    assert status == 0
    assert (times == 1).all()
    assert (taken_by >= 0).all()
    assert (taken_by < n_threads).all()


@pytest.mark.parametrize(("n_threads", "n_held"), [(2, 1), (6, 1), (6, 3), (12, 11)])
def test_slow_cores_hold_nobody_up(
    kernel_library: ctypes.CDLL, n_threads: int, n_held: int
) -> None:
    """Whoever holds a piece until the others are done gets no other, and they lack none.

    With work split beforehand the held pieces would wait for those behind them, in vain.
    """
    status, taken_by, times = _share(kernel_library, n_threads, 120, n_held)
    assert status == 0, "a piece was left to a thread that was busy"
    assert (times == 1).all()
    slow = taken_by[:n_held]
    assert len(set(slow)) == n_held
    assert not np.isin(taken_by[n_held:], slow).any()
