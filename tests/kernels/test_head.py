"""Statistics, the draw and the soft embedding of every instruction set against NumPy in float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import support.kernel_api as api


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(
    kernels: ctypes.CDLL, name: str, x: np.ndarray, norm: np.ndarray, table: np.ndarray, t: float
) -> np.ndarray:
    packed = api.as_packed(kernels, api.rms(x, norm), name)
    return 30 * np.tanh(packed @ api.as_decoded(kernels, table, name).T / 30) / t


@pytest.mark.parametrize("sharpness", [0.2, 3.0, 30.0])
@pytest.mark.parametrize(
    ("name", "n_embd"), [("f32", 40), ("q4_0", 96), ("q6_k", 256), ("q8_0", 288)]
)
@pytest.mark.parametrize(("n", "n_vocab"), [(1, 33), (5, 64), (17, 1000), (33, 5000)])
def test_sample(
    kernels: ctypes.CDLL, name: str, n_embd: int, n: int, n_vocab: int, sharpness: float
) -> None:
    """Wide, medium and narrow distributions; every uniform number draws a token."""
    rng = np.random.default_rng([n, n_vocab, int(sharpness * 10)])
    params, table, norm, _alive = api.head_params(rng, name, n_vocab, n_embd, n, bound=1e-6)
    norm = (norm * sharpness).astype(np.float32)
    params.norm = api.address(norm)
    x = api.activations(rng, n, n_embd)
    uniforms = rng.random(n).astype(np.float32)
    uniforms[0] = 0.0
    uniforms[-1] = np.float32(1 - 2**-24)
    results = []
    for n_threads in (1, 3):
        params.n_threads = n_threads
        argmax, candidates = (api.Output(n, dtype=np.int32) for _ in range(2))
        entropies, soft = api.Output(n), api.Output(n, n_embd)
        status = kernels.test_sample(
            ctypes.byref(params), api.pointer(x), n, ctypes.c_float(0.6), api.pointer(uniforms),
            argmax.pointer, candidates.pointer, entropies.pointer, soft.pointer,
        )  # fmt: skip
        assert status == 0
        results.append([argmax.read(), candidates.read(), entropies.read(), soft.read()])
    for one, other in zip(*results, strict=True):
        assert (one == other).all(), "the result depends on the number of threads"
    argmax, candidates, entropies, soft = results[0]

    z = reference(kernels, name, x, norm, table, 0.6)
    p = softmax(z)
    rows = np.arange(n)
    assert (z[rows, argmax] >= z.max(1) - 1e-4).all()
    expected_entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    # A few weights of tile products round the other way than here.
    tolerance = 1e-3 if kernels.test_operands(api.TYPES[name]) == api.TILES else 2e-4
    assert np.abs(entropies - expected_entropy).max() <= tolerance
    # The drawn token's stretch of the running sum holds the uniform number, but for rounding.
    upper = np.cumsum(p, 1)[rows, candidates]
    lower = upper - p[rows, candidates]
    assert (lower <= uniforms + 1e-5).all()
    assert (upper >= uniforms - 1e-5).all()
    assert (p[rows, candidates] > 1e-38).all()
    expected = p @ table * np.sqrt(n_embd)
    # Weights and table may be rounded where the table is quantized anyway.
    assert api.relative_error(soft, expected) <= (1e-4 if name == "f32" else 1e-2)


@pytest.mark.parametrize(("name", "n_embd"), [("f32", 40), ("q4_0", 96), ("q6_k", 512)])
@pytest.mark.parametrize("bound", [0.0, 1e-6])
def test_soft_embedding(kernels: ctypes.CDLL, name: str, n_embd: int, bound: float) -> None:
    rng = np.random.default_rng(n_embd)
    n, n_vocab = 19, 1100
    params, table, _, _alive = api.head_params(rng, name, n_vocab, n_embd, 8, bound)
    z = (rng.normal(0, 1, (n, n_vocab)) * np.geomspace(0.1, 30, n)[:, None]).astype(np.float32)
    soft = api.Output(n, n_embd)
    status = kernels.test_soft_embedding(ctypes.byref(params), api.pointer(z), n, soft.pointer)
    assert status == 0
    expected = softmax(z.astype(np.float64)) @ table * np.sqrt(n_embd)
    assert api.relative_error(soft.read(), expected) <= (1e-5 if name == "f32" else 1e-2)


@pytest.mark.parametrize(("name", "n_embd"), [("f32", 40), ("q4_0", 96), ("q6_k", 512)])
@pytest.mark.parametrize("bound", [0.0, 1e-6, 1e-3])
def test_soft_embedding_of_one_row(
    kernels: ctypes.CDLL, name: str, n_embd: int, bound: float
) -> None:
    """Tokens that a row leaves out stay out, to the last bit, where its neighbours want them."""
    rng = np.random.default_rng(n_embd)
    n, n_vocab = 37, 3001
    params, _, _, _alive = api.head_params(rng, name, n_vocab, n_embd, n, bound)
    sharpness = rng.permutation(np.geomspace(0.1, 40, n))[:, None]
    z = (rng.normal(0, 1, (n, n_vocab)) * sharpness).astype(np.float32)

    def soft_of(rows: np.ndarray) -> np.ndarray:
        soft, some = api.Output(len(rows), n_embd), np.ascontiguousarray(z[rows])
        status = kernels.test_soft_embedding(
            ctypes.byref(params), api.pointer(some), len(rows), soft.pointer
        )
        assert status == 0
        return soft.read()

    together = soft_of(np.arange(n))
    assert (soft_of(np.arange(n)[::-1]) == together[::-1]).all()
    for row in range(n):
        assert (soft_of(np.array([row])) == together[row]).all()
