"""The engine's draws in NumPy: Philox4x32-10, counter (position, step, canvas, purpose)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INITIAL, CANDIDATE, RENOISE = range(3)

U64 = NDArray[np.uint64]


def philox4x32(counter: U64, key: tuple[int, int]) -> U64:
    """Four 32-bit words for each counter (…, 4), by Salmon et al., SC 2011."""
    low32 = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        shift = np.uint64(32)
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & low32,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & low32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def draws(seed: int, canvas: int, step: int, n: int, purpose: int) -> U64:
    """One 32-bit draw for each of `n` positions."""
    counter = np.empty((n, 4), np.uint64)
    counter[:] = [0, step, canvas, purpose]
    counter[:, 0] = np.arange(n)
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[:, 0]


def _tokens(bits: U64, n_vocab: int) -> NDArray[np.int64]:
    return ((bits * np.uint64(n_vocab)) >> np.uint64(32)).astype(np.int64)


def initial_tokens(seed: int, canvas: int, n: int, n_vocab: int) -> NDArray[np.int64]:
    """The first, uniformly random canvas."""
    return _tokens(draws(seed, canvas, 0, n, INITIAL), n_vocab)


def renoise_tokens(seed: int, canvas: int, step: int, n: int, n_vocab: int) -> NDArray[np.int64]:
    """Fresh tokens for the positions that step `step` (from 1) did not accept."""
    return _tokens(draws(seed, canvas, step, n, RENOISE), n_vocab)


def candidate_uniforms(seed: int, canvas: int, step: int, n: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2^-24, that pick each position's candidate."""
    return (draws(seed, canvas, step, n, CANDIDATE) >> np.uint64(8)).astype(np.float64) / 2**24
