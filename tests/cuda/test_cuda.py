"""The CUDA backend against the CPU's, its kernels run by the emulation in tests/cuda/emulation/.

Nothing here needs a GPU. On a machine that has one, DGEMMA_TEST_CUDA names a compiled
libdgemma_cuda.so, and the same tests run on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from support.engine import open_model
from support.logits import canvas_logits, median_error

emulated = pytest.mark.skipif("DGEMMA_TEST_CUDA" in os.environ, reason="steers the emulated device")


def thorough(*values: Any) -> Any:
    """A case that `make test` leaves to `make test-cuda`: emulation is slow."""
    return pytest.param(*values, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    "name", ["small", "odd", thorough("narrow"), thorough("long"), thorough("wide")]
)
def test_float_weights_agree_with_the_cpu(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], name: str
) -> None:
    path = gguf_file(name)
    expected = canvas_logits(open_model(path, n_ctx=256), name)
    # Prompts longer than the batch and the window: rings wrap, batches follow each other.
    actual = canvas_logits(cuda(path, n_batch=16), name)
    assert np.abs(actual - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("outtype", [thorough("f16"), "bf16"])
def test_16_bit_weights_agree_with_the_cpu(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], outtype: str
) -> None:
    path = gguf_file("small", outtype)
    expected = canvas_logits(open_model(path, n_ctx=256), "small")
    actual = canvas_logits(cuda(path), "small")
    assert np.abs(actual - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "outtype"),
    [
        thorough("small", "q8_0"),
        ("small", "q4_0"),
        thorough("small", "q4_1"),
        thorough("small", "q5_0"),
        ("small", "q5_1"),
        thorough("small", "iq4_nl"),
        ("odd", "nvfp4"),
        thorough("wide", "q2_k"),
        thorough("wide", "q3_k_m"),
        ("wide", "q4_k_m"),
        thorough("wide", "q5_k_m"),
        thorough("wide", "q6_k"),
        ("wide", "iq4_xs"),
    ],
)
def test_quantized_weights_agree_with_the_cpu(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], name: str, outtype: str
) -> None:
    path = gguf_file(name, outtype)
    expected = canvas_logits(open_model(path, n_ctx=256), name, n_prompt=9)
    actual = canvas_logits(cuda(path), name, n_prompt=9)
    # Both round activations to int8, a relative error of 0.4 % a product.
    assert median_error(actual, expected) < 0.03
    assert (actual.argmax(-1) == expected.argmax(-1)).mean() > 0.9


@emulated
@pytest.mark.parametrize("name", ["odd", thorough("wide")])
def test_native_fp4_agrees_with_the_cpu(
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """GPUs that multiply FP4 take activations as two FP4 terms."""
    path = gguf_file(name, "nvfp4")
    expected = canvas_logits(open_model(path, n_ctx=256), name, n_prompt=9)
    int8 = canvas_logits(cuda(path), name, n_prompt=9)
    monkeypatch.setenv("DGEMMA_EMULATION_FP4", "1")
    actual = canvas_logits(cuda(path), name, n_prompt=9)
    assert not np.array_equal(actual, int8)
    assert median_error(actual, expected) < 0.05
    assert (actual.argmax(-1) == expected.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize(
    ("name", "cache", "tolerance"),
    [
        thorough("small", "f16", 4e-3),
        thorough("odd", "bf16", 3e-2),
        ("long", "f16", 4e-3),
        ("odd", "q8_0", 5e-2),
    ],
)
def test_narrow_caches_agree_with_a_float32_cache(
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    name: str,
    cache: str,
    tolerance: float,
) -> None:
    path = gguf_file(name)
    expected = canvas_logits(open_model(path, n_ctx=256), name)
    actual = canvas_logits(cuda(path, type_k=cache, type_v=cache, n_batch=16), name)
    assert median_error(actual, expected) < tolerance


def answer(model: Any) -> tuple[list[int], list[int]]:
    out = model.generate([1, 2, 3, 4, 5], max_tokens=30, seed=3, max_denoising_steps=5)
    return list(out.tokens), list(out.stats.steps)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("small", "backward"),
        ("odd", "7"),
        thorough("small", "forward"),
        thorough("small", "7"),
        thorough("odd", "forward"),
        thorough("odd", "backward"),
    ],
)
def test_same_seed_gives_the_cpus_text(
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    order: str,
) -> None:
    # The order in which threads run must not matter: a missing barrier would show here.
    monkeypatch.setenv("DGEMMA_EMULATION_ORDER", order)
    path = gguf_file(name)
    assert answer(cuda(path)) == answer(open_model(path, n_ctx=256))


@emulated
def test_out_of_memory_is_an_error_and_auto_falls_back(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_file("small")
    monkeypatch.setenv("DGEMMA_EMULATION_MEMORY", "100000")
    with pytest.raises(dgemma.OutOfMemoryError, match="GPU"):
        cuda(path)
    model = cuda(path, backend="auto")
    assert model.info.backend_name.startswith("cpu")
    assert "GiB" in model.info.backend_note
    # Enough for the weights, too little for a second session; the first one stays usable.
    monkeypatch.delenv("DGEMMA_EMULATION_MEMORY")
    model = cuda(path)
    assert model.info.backend_name.startswith("cuda")
    before = canvas_logits(model, "small", n_prompt=3)
    monkeypatch.setenv("DGEMMA_EMULATION_MEMORY", "1")
    with pytest.raises(dgemma.OutOfMemoryError, match="GPU"):
        model.session()
    monkeypatch.delenv("DGEMMA_EMULATION_MEMORY")
    assert np.array_equal(canvas_logits(model, "small", n_prompt=3), before)


@emulated
def test_without_a_device_the_reason_is_given(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_file("small")
    monkeypatch.setenv("DGEMMA_EMULATION_DEVICES", "0")
    with pytest.raises(dgemma.BackendError, match="no GPU"):
        cuda(path)
    model = cuda(path, backend="auto", n_gpu_layers=1)
    assert model.info.backend_name.startswith("cpu")
    assert "no GPU" in model.info.backend_note


def test_without_the_library_the_reason_is_given(
    gguf_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGEMMA_CUDA_LIBRARY", "/nowhere/libdgemma_cuda.so")
    with pytest.raises(dgemma.BackendError, match="cannot be loaded"):
        open_model(gguf_file("small"), backend="cuda")


def test_a_type_without_kernels_is_refused_by_name(
    cuda: Callable[..., Any], tmp_path: Path, gguf_file: Callable[..., Path]
) -> None:
    """No converter here writes IQ2 or IQ3: a Q6_K tensor is relabelled, whose blocks are larger."""
    path = tmp_path / "iq2.gguf"
    data = bytearray(gguf_file("wide", "q6_k").read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert int.from_bytes(data[at : at + 4], "little") == 14  # q6_k
    data[at : at + 4] = (16).to_bytes(4, "little")  # iq2_xxs
    path.write_bytes(data)
    with pytest.raises(dgemma.BackendError, match=r"type iq2_xxs .*attn_q"):
        cuda(path)
    assert cuda(path, backend="auto").info.backend_name.startswith("cpu")
