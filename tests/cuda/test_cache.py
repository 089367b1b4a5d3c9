"""What the CUDA backend writes into a session's cache, byte by byte beside the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.checkpoints import SPECS
from support.engine import open_model, random_tokens

HEADER = 48  # of a session's file; then the tokens, int32, then keys and values
N_PROMPT = 21
# Largest error of a scale of 32 values (q8_0) or of a value, relative: two roundings of 11, 11 and
# 8 bits. A lost lower byte costs up to 2^-2, 2^-2 and 1.
LIMITS = {"q8_0": 2**-10, "f16": 2**-10, "bf16": 2**-7}


def first_layer(model: Any, name: str, cache: str, path: Path) -> NDArray[np.uint8]:
    """Keys and values of the first layer behind a prompt, as they lie in the cache.

    They follow from the token alone; behind the first attention the roundings of both sides part.
    """
    prompt, _ = random_tokens(name, N_PROMPT)
    with model.session() as session:
        session.prefill(prompt)
        session.save(path)
    file = np.fromfile(path, np.uint8)
    n_past, first_held = file[20:28].view(np.int32)
    n_rows = 2 * SPECS[name].kv_heads * (n_past - first_held)
    type_bytes = {"q8_0": 34, "f16": 64, "bf16": 64}[cache]
    return file[HEADER + 4 * N_PROMPT :][: n_rows * SPECS[name].head_dim // 32 * type_bytes]


def values_of(rows: NDArray[np.uint8], cache: str) -> NDArray[np.float32]:
    """The 16-bit floats of a cache: the scales of q8_0, else all values."""
    if cache == "q8_0":
        return rows.reshape(-1, 34)[:, :2].copy().view(np.float16).astype(np.float32).ravel()
    if cache == "f16":
        return rows.view(np.float16).astype(np.float32)
    return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def codes_of(rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The integers of q8_0."""
    return rows.reshape(-1, 34)[:, 2:].view(np.int8).astype(np.int64)


def error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Of the values that are not tiny, the largest error relative to them."""
    kept = np.abs(expected) > 1e-2 * np.abs(expected).max()
    return float((np.abs(actual - expected)[kept] / np.abs(expected)[kept]).max())


@pytest.mark.parametrize("cache", ["q8_0", "f16", "bf16"])
def test_the_cache_holds_what_the_cpus_does(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], tmp_path: Path, cache: str
) -> None:
    path, options = gguf_file("odd"), {"type_k": cache, "type_v": cache, "n_ctx": 256}
    expected = first_layer(open_model(path, **options), "odd", cache, tmp_path / "cpu")
    actual = first_layer(cuda(path, **options), "odd", cache, tmp_path / "cuda")
    assert actual.size == expected.size > 0
    wanted = values_of(expected, cache)
    assert error(values_of(actual, cache), wanted) < LIMITS[cache]
    if cache == "q8_0":  # the codes: the CPU divides by the rounded scale
        ours, theirs = (codes_of(rows) for rows in (actual, expected))
        assert np.abs(ours - theirs).max() <= 1
    # The limit is one that a lost lower byte would fail.
    damaged = actual.copy()
    if cache == "q8_0":
        damaged.reshape(-1, 34)[:, 0] = 0
    else:
        damaged[::2] = 0
    assert error(values_of(damaged, cache), wanted) > 4 * LIMITS[cache]
