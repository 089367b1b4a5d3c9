"""Attention and its projections of every instruction set against NumPy in float64."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest

import support.kernel_api as api

CACHE_TYPES = {"f32": api.F32, "f16": api.F16, "bf16": api.BF16, "q8_0": api.Q8_0}


def encode_cache(values: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Cache rows of a type, padded to whole blocks, and the values that they stand for."""
    n_dims = values.shape[-1]
    kind = gguf.GGMLQuantizationType(CACHE_TYPES[type_name])
    block = gguf.GGML_QUANT_SIZES[kind][0]
    filled = np.zeros((*values.shape[:-1], -(-n_dims // block) * block), np.float32)
    filled[..., :n_dims] = values
    encoded = gguf.quants.quantize(filled.reshape(-1, filled.shape[-1]), kind)
    decoded = gguf.quants.dequantize(encoded, kind).reshape(filled.shape)[..., :n_dims]
    return api.padded(encoded), decoded.astype(np.float64)


def attention_params(
    n_heads: int, n_kv: int, head_dim: int, n_rot: int, window: int, type_k: str, type_v: str
) -> api.AttentionParams:
    return api.AttentionParams(
        n_embd=32, n_heads=n_heads, n_kv_heads=n_kv, head_dim=head_dim, n_rot=n_rot, window=window,
        complete_keys=n_rot == head_dim, type_k=CACHE_TYPES[type_k], type_v=CACHE_TYPES[type_v],
        n_threads=2, rope_base=10000.0,
    )  # fmt: skip


@pytest.mark.parametrize(("type_k", "type_v"), [(k, k) for k in CACHE_TYPES] + [("f16", "q8_0")])
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "head_dim", "n_rot"),
    [(4, 2, 32, 32), (2, 1, 6, 6), (8, 1, 72, 24), (6, 3, 20, 8)],
)
@pytest.mark.parametrize(("n", "n_past"), [(1, 0), (3, 70), (33, 5), (40, 200)])
@pytest.mark.parametrize("causal", [True, False])
def test_attend(
    kernels: ctypes.CDLL, n_heads: int, n_kv: int, head_dim: int, n_rot: int,
    n: int, n_past: int, causal: bool, type_k: str, type_v: str,
) -> None:  # fmt: skip
    """Cache and canvas, wrapped around; keys complete, or a function of values."""
    rng = np.random.default_rng([n, n_past, head_dim])
    window = 50 if head_dim == n_rot and n_past % 2 == 0 else 0
    capacity = n_past + 3
    keys = rng.normal(0, 0.6, (n_kv, n_past + n, n_rot))
    values = rng.normal(0, 1, (n_kv, n_past + n, head_dim))
    params = attention_params(n_heads, n_kv, head_dim, n_rot, window, type_k, type_v)
    first_position = 1000
    alive, decoded = [], {}
    for name, content, kind in (("k", keys, type_k), ("v", values, type_v)):
        parts, memory = [], []
        for first, n_tokens, n_slots in ((0, n_past, capacity), (n_past, n, n)):
            ring = np.full((n_kv, n_slots, content.shape[-1]), 7.0)
            slots = (first_position + first + np.arange(n_tokens)) % n_slots
            ring[:, slots] = content[:, first : first + n_tokens]
            encoded, ring_values = encode_cache(ring, kind)
            memory.append(encoded)
            parts.append(ring_values[:, slots])
        alive += memory
        getattr(params, name)[:] = [part.ctypes.data for part in memory]
        decoded[name] = np.concatenate(parts, 1)
    params.capacity[:] = [capacity, n]
    params.span_position[:] = [first_position, first_position + n_past]
    params.span_n[:] = [n_past, n]
    q = api.padded(rng.normal(0, 1, (n, n_heads, head_dim)).astype(np.float32))
    out = api.Output(n, n_heads * head_dim)
    status = kernels.test_attend(
        ctypes.byref(params), api.pointer(q), n, first_position + n_past, int(causal), out.pointer
    )
    assert status == 0

    half, rotated = head_dim // 2, n_rot // 2
    complete = decoded["v"].copy()
    complete[..., :rotated] = decoded["k"][..., :rotated]
    complete[..., half : half + rotated] = decoded["k"][..., rotated:]
    position = np.arange(n_past + n)
    query = position[n_past:, None]
    seen = position[None] <= query if causal else np.ones((n, n_past + n), bool)
    if causal and window:
        seen &= query - position[None] < window
    expected = np.zeros((n, n_heads, head_dim))
    for head in range(n_heads):
        kv = head // (n_heads // n_kv)
        scores = np.where(seen, q[:, head].astype(np.float64) @ complete[kv].T, -np.inf)
        p = np.exp(scores - scores.max(1, keepdims=True))
        expected[:, head] = p / p.sum(1, keepdims=True) @ decoded["v"][kv]
    # Where the cache has 16 bits or fewer, both sides of every product may be rounded.
    tolerance = 2e-6 if type_k == "f32" else 6e-3
    assert api.relative_error(out.read().reshape(expected.shape), expected) <= tolerance


def rope(x: np.ndarray, position: int, n_rot: int) -> np.ndarray:
    """x (n, heads, head_dim) turned; token i is at position + i."""
    half, pairs = x.shape[-1] // 2, n_rot // 2
    inverse = 10000.0 ** (2 * np.arange(pairs) / x.shape[-1])
    angle = (position + np.arange(len(x)))[:, None] / inverse
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    out = x.copy()
    a, b = x[..., :pairs], x[..., half : half + pairs]
    out[..., :pairs] = a * cosine - b * sine
    out[..., half : half + pairs] = b * cosine + a * sine
    return out


@pytest.mark.parametrize("type_name", CACHE_TYPES)
@pytest.mark.parametrize(("head_dim", "n_rot"), [(32, 32), (40, 12), (6, 6)])
@pytest.mark.parametrize("wanted", [True, False])
def test_project_qkv(
    kernels: ctypes.CDLL, head_dim: int, n_rot: int, wanted: bool, type_name: str
) -> None:
    rng = np.random.default_rng(head_dim)
    n, n_heads, n_kv, n_embd, position, capacity = 9, 4, 2, 32, 21, 13
    params = attention_params(n_heads, n_kv, head_dim, n_rot, 0, type_name, type_name)
    complete = n_rot == head_dim
    wq, wk, wv = (
        api.padded(rng.normal(0, 0.2, (heads * head_dim, n_embd)).astype(np.float32))
        for heads in (n_heads, n_kv, n_kv)
    )
    norm = rng.normal(1, 0.3, n_embd).astype(np.float32)
    q_norm, k_norm = rng.normal(1, 0.3, (2, head_dim)).astype(np.float32)
    x = api.activations(rng, n, n_embd)
    nothing = np.zeros((n_kv, capacity, 1))
    k_memory, _ = encode_cache(np.broadcast_to(nothing, (n_kv, capacity, n_rot)), type_name)
    v_memory, _ = encode_cache(np.broadcast_to(nothing, (n_kv, capacity, head_dim)), type_name)
    params.k[0], params.v[0] = k_memory.ctypes.data, v_memory.ctypes.data
    params.capacity[0] = capacity
    q_out = api.Output(n, n_heads, head_dim)
    status = kernels.test_project_qkv(
        ctypes.byref(params), api.pointer(wq), api.pointer(wk),
        api.pointer(wv if complete else None), api.pointer(norm), api.pointer(q_norm),
        api.pointer(k_norm), api.pointer(x), n, position,
        q_out.pointer if wanted else ctypes.c_void_p(None),
    )  # fmt: skip
    assert status == 0

    h = api.rms(x, norm)
    raw_k = (h @ wk.T).reshape(n, n_kv, head_dim)
    raw_v = (h @ wv.T).reshape(n, n_kv, head_dim) if complete else raw_k
    half, rotated = head_dim // 2, n_rot // 2
    if wanted:
        q = rope(api.rms((h @ wq.T).reshape(n, n_heads, head_dim), q_norm), position, n_rot)
        if not complete:
            unrotated = np.arange(head_dim) % half >= rotated
            q = np.where(unrotated, q * k_norm, q)
        assert api.relative_error(q_out.read(), q) <= 2e-6
    k = rope(api.rms(raw_k, k_norm), position, n_rot)
    stored = np.concatenate([k[..., :rotated], k[..., half : half + rotated]], -1)
    kind = gguf.GGMLQuantizationType(CACHE_TYPES[type_name])
    slots = (position + np.arange(n)) % capacity
    tolerance = {"f32": 2e-6, "f16": 5e-4, "bf16": 3e-3, "q8_0": 1e-2}[type_name]
    for memory, expected in ((k_memory, stored), (v_memory, api.rms(raw_v))):
        decoded = gguf.quants.dequantize(memory, kind).reshape(n_kv, capacity, -1)
        actual = decoded[:, slots].transpose(1, 0, 2)[..., : expected.shape[-1]]
        assert api.relative_error(actual, expected) <= tolerance
