"""Every kernel of every instruction set against NumPy in float64, at odd sizes.

Integer products are compared with activations rounded to int8 as the engine rounds them, and tile
products with both operands rounded to bfloat16: what then remains is float32 rounding of the sums,
and here and there a weight at the edge between two numbers that rounds the other way.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import support.kernel_api as api

ROWS = [1, 2, 3, 15, 16, 17, 33]


@pytest.mark.parametrize("name", api.TYPES)
@pytest.mark.parametrize("n", ROWS)
def test_product(kernels: ctypes.CDLL, name: str, n: int) -> None:
    """The head's logits: norm, packing, decoding, product, soft-cap; the last panel is ragged."""
    rng = np.random.default_rng([n, api.TYPES[name]])
    n_embd = 512 if "k" in name or "iq" in name else 64 * (1 + n % 3)
    n_vocab = 77 + n % 16
    params, table, norm, _alive = api.head_params(rng, name, n_vocab, n_embd, n)
    x = api.activations(rng, n, n_embd)
    out = api.Output(n, n_vocab)
    assert kernels.test_logits(ctypes.byref(params), api.pointer(x), n, out.pointer) == 0
    packed = api.as_packed(kernels, api.rms(x, norm), name)
    expected = 30 * np.tanh(packed @ api.as_decoded(kernels, table, name).T / 30)
    if kernels.test_operands(api.TYPES[name]) == api.TILES:
        assert api.relative_error(out.read(), expected) <= 1e-3
        exact = 30 * np.tanh(api.rms(x, norm) @ table.T / 30)
        assert api.relative_error(out.read(), exact) <= 5e-3
    else:
        assert np.abs(out.read() - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("n_cols", [1, 2, 5, 16, 31, 33, 300])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_float_product_of_any_width(kernels: ctypes.CDLL, name: str, n_cols: int) -> None:
    rng = np.random.default_rng([n_cols, api.TYPES[name]])
    n, n_vocab = 7, 35
    params, table, norm, _alive = api.head_params(rng, name, n_vocab, n_cols, n)
    x = api.activations(rng, n, n_cols)
    out = api.Output(n, n_vocab)
    assert kernels.test_logits(ctypes.byref(params), api.pointer(x), n, out.pointer) == 0
    expected = 30 * np.tanh(api.rms(x, norm) @ table.T / 30)
    assert np.abs(out.read() - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    ("gate", "up", "down", "n_ff"),
    [
        ("f32", "f32", "f32", 70),
        ("bf16", "f16", "f32", 33),
        ("q4_0", "q4_0", "q4_0", 96),
        ("q8_0", "q8_0", "q8_0", 32),
        ("nvfp4", "nvfp4", "nvfp4", 192),
        ("q4_k", "q4_k", "q5_0", 96),
        ("q6_k", "q6_k", "q8_0", 64),
        ("q4_0", "q8_0", "q6_k", 256),
        ("q4_0", "q4_0", "f16", 40),
        ("f16", "f16", "q4_1", 64),
        ("iq4_nl", "iq4_nl", "iq3_s", 256),
    ],
)
@pytest.mark.parametrize("n", [1, 17, 33])
def test_mlp(kernels: ctypes.CDLL, gate: str, up: str, down: str, n_ff: int, n: int) -> None:
    rng = np.random.default_rng([n, n_ff])
    n_embd = 256
    w_gate, gate_values = api.random_weight(rng, gate, n_ff, n_embd)
    w_up, up_values = api.random_weight(rng, up, n_ff, n_embd)
    w_down, down_values = api.random_weight(rng, down, n_embd, n_ff)
    scales = np.array([0.5, 1.25, 2.0], np.float32)
    norm = rng.normal(1, 0.3, n_embd).astype(np.float32)
    x = api.activations(rng, n, n_embd)
    out = api.Output(n, n_embd)
    status = kernels.test_mlp(
        n_embd, n_ff, api.TYPES[gate], api.pointer(w_gate), api.TYPES[up], api.pointer(w_up),
        api.TYPES[down], api.pointer(w_down), api.pointer(scales), api.pointer(norm),
        api.pointer(x), n, 2, out.pointer,
    )  # fmt: skip
    assert status == 0
    packed = api.as_packed(kernels, api.rms(x, norm), gate, up)
    gate_values = api.as_decoded(kernels, gate_values * 0.5, gate, up)
    up_values = api.as_decoded(kernels, up_values * 1.25, gate, up)
    hidden = api.gelu(packed @ gate_values.T) * (packed @ up_values.T)
    down_values = api.as_decoded(kernels, down_values * 2.0, down)
    expected = api.as_packed(kernels, hidden, down) @ down_values.T
    # A hidden value at the edge between two codes may round the other way: one code of 127.
    rounded = any(api.is_rounded(kernels, name) for name in (gate, up, down))
    assert api.relative_error(out.read(), expected) <= (1e-3 if rounded else 1e-6)


def route(
    x: np.ndarray, router: np.ndarray, scale: np.ndarray, expert_scale: np.ndarray, n_used: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts and their shares, (n, n_used)."""
    logits = api.rms(x) * scale / np.sqrt(x.shape[1]) @ router.T.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    chosen = np.argsort(-p, 1, kind="stable")[:, :n_used]
    share = np.take_along_axis(p, chosen, 1)
    return chosen, share / share.sum(1, keepdims=True) * expert_scale[chosen]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "down", "n_ff"),
    [("f32", "f32", 40), ("q4_0", "q4_0", 96), ("nvfp4", "nvfp4", 64), ("q6_k", "q8_0", 32)],
)
@pytest.mark.parametrize(
    ("n", "n_experts", "n_used"), [(1, 4, 2), (3, 5, 5), (33, 7, 3), (40, 2, 1)]
)
def test_moe(
    kernels: ctypes.CDLL, name: str, down: str, n_ff: int, fused: bool,
    n: int, n_experts: int, n_used: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng([n, n_ff, fused])
    n_embd = 256
    encoded, gate_up = api.random_weight(rng, name, n_experts * 2 * n_ff, n_embd)
    gate_up = gate_up.reshape(n_experts, 2 * n_ff, n_embd)
    by_expert = encoded.reshape(n_experts, 2 * n_ff, -1)
    gate, up = (np.ascontiguousarray(half) for half in np.split(by_expert, 2, 1))
    w_down, down_values = api.random_weight(rng, down, n_experts * n_embd, n_ff)
    down_values = down_values.reshape(n_experts, n_embd, n_ff)
    router = rng.normal(0, 1.5, (n_experts, n_embd)).astype(np.float32)
    router_scale, norm = rng.normal(1, 0.2, (2, n_embd)).astype(np.float32)
    scales, expert_scale = rng.uniform(0.5, 2, (2, n_experts)).astype(np.float32)
    x = api.activations(rng, n, n_embd)
    params = api.MoeParams(
        n_embd, n_ff, n_experts, n_used, api.TYPES[name], api.TYPES[down], api.address(router),
        api.address(router_scale), api.address(norm), api.address(expert_scale),
        api.address(encoded if fused else None), api.address(gate), api.address(up),
        api.address(w_down), api.address(scales),
    )  # fmt: skip
    outputs = []
    for n_threads in (1, 3):
        out = api.Output(n, n_embd)
        arguments = ctypes.byref(params), api.pointer(x), n, n_threads, out.pointer
        assert kernels.test_moe(*arguments) == 0
        outputs.append(out.read())
    assert (outputs[0] == outputs[1]).all(), "the result depends on the number of threads"

    packed = api.as_packed(kernels, api.rms(x, norm), name)
    chosen, share = route(x, router, router_scale, expert_scale, n_used)
    expected = np.zeros((n, n_embd))
    for row in range(n):
        for expert, weight in zip(chosen[row], share[row], strict=True):
            scaled = api.as_decoded(kernels, gate_up[expert] * scales[expert], name)
            product = packed[row] @ scaled.T
            hidden = api.gelu(product[:n_ff]) * product[n_ff:]
            hidden = api.as_packed(kernels, hidden, down)
            scaled = api.as_decoded(kernels, down_values[expert] * scales[expert], down)
            expected[row] += weight * (scaled @ hidden)
    rounded = api.is_rounded(kernels, down)
    assert api.relative_error(outputs[0], expected) <= (1e-3 if rounded else 2e-6)


@pytest.mark.parametrize("name", ["f32", "bf16", "q4_0", "q6_k", "nvfp4"])
def test_embedding(kernels: ctypes.CDLL, name: str) -> None:
    rng = np.random.default_rng(3)
    params, table, _, _alive = api.head_params(rng, name, 9, 256, 4)
    ids = np.array([8, 0, 3, 3], np.int32)
    out = api.Output(4, 256)
    assert kernels.test_embed(ctypes.byref(params), api.pointer(ids), 4, out.pointer) == 0
    assert api.relative_error(out.read(), table[ids] * 16) <= 1e-6
