"""The kernels of compute capability 9.0 (native/cuda/hopper), in the emulation.

test_cuda.py runs whole models on them. Here: single products of every type and shape, and what the
emulation makes of wrong uses of barriers, copies and products, which would otherwise prove nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma._native import Model, Session
from support.engine import open_model
from support.logits import canvas_logits, median_error

pytestmark = pytest.mark.skipif(
    "DGEMMA_TEST_CUDA" in os.environ, reason="steers the emulated device"
)

# Numbers of dg_type, and the largest relative error of a token. 1.7e-4 are activations of 11 bits;
# as much again is a weight's code times its scale, rounded once, and more where scales are
# products themselves. float16, bfloat16 and NVFP4 weights are exact. (int8 activations: 4e-3.)
LIMITS = {
    "q4_0": (2, 5e-4), "q4_1": (3, 5e-4), "q5_0": (6, 5e-4), "q5_1": (7, 5e-4), "q8_0": (8, 5e-4),
    "q2_k": (10, 7e-4), "q3_k": (11, 6e-4), "q4_k": (12, 6e-4), "q5_k": (13, 6e-4),
    "q6_k": (14, 6e-4), "iq4_nl": (20, 5e-4), "iq4_xs": (23, 6e-4), "nvfp4": (40, 3.5e-4),
    "f16": (1, 3.5e-4), "bf16": (30, 3.5e-4), "f32": (0, 5e-4),
}  # fmt: skip


@pytest.fixture
def product(
    cuda_library: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[float, int]]:
    """Relative error of a product on the emulated device, and into how many splits it went."""
    monkeypatch.setenv("DGEMMA_EMULATION_CAPABILITIES", "90")
    function = ctypes.CDLL(str(cuda_library)).emulation_hopper_product
    function.restype = ctypes.c_double

    def run(
        kind: str, n: int, rows: int, columns: int, processors: int = 4, outlier: float = 1
    ) -> tuple[float, int]:
        splits, scale = ctypes.c_int32(), ctypes.c_float(outlier)
        error = function(LIMITS[kind][0], n, rows, columns, scale, processors, ctypes.byref(splits))
        return error, splits.value

    return run


@pytest.mark.parametrize("kind", LIMITS)
def test_every_type_is_multiplied(product: Callable[..., tuple[float, int]], kind: str) -> None:
    error, splits = product(kind, n=5, rows=40, columns=1024, processors=12)
    assert splits == 4
    assert 0 < error < LIMITS[kind][1]


@pytest.mark.parametrize(
    ("kind", "n", "rows", "columns"),
    [
        ("q4_0", 1, 16, 64),
        ("q4_0", 65, 129, 96),  # two tiles of tokens' width, rows of two blocks, half a stage
        ("q4_0", 256, 40, 320),
        ("q6_k", 300, 200, 256),  # two blocks of tokens
        ("q8_0", 129, 300, 704),  # stages come round
        ("bf16", 17, 200, 96),  # fewer float tiles than a stage has
        ("f32", 130, 24, 160),  # at most 128 tokens a block
    ],
)
def test_shapes_that_do_not_fit(
    product: Callable[..., tuple[float, int]], kind: str, n: int, rows: int, columns: int
) -> None:
    assert product(kind, n, rows, columns)[0] < LIMITS[kind][1]


@pytest.mark.parametrize("kind", ["q4_0", "q6_k", "bf16"])
@pytest.mark.parametrize("outlier", [1e4, 1e6])
def test_outlying_channels_do_not_overflow(
    product: Callable[..., tuple[float, int]], kind: str, outlier: float
) -> None:
    """Tokens differ by 2^60 as well (hopper_api.cpp); float16 ends at 65,504 and loses bits from
    2^-14 down."""
    assert product(kind, 20, 64, 512, outlier=outlier)[0] < LIMITS[kind][1]


@pytest.mark.parametrize("order", ["backward", "7"])
def test_the_order_of_threads_does_not_matter(
    product: Callable[..., tuple[float, int]], monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    forward = product("q4_0", 20, 150, 704)
    monkeypatch.setenv("DGEMMA_EMULATION_ORDER", order)
    assert product("q4_0", 20, 150, 704) == forward


# What becomes of each misuse of hopper_api.cpp: wrong results, or the end of the program.
MISUSES = {
    "right": "right", "wrong phase": "nobody has waited for", "early release": "differs",
    "wrong distance": "differs", "early decode": "differs", "early read": "differs",
    "no begin": "without products_begin", "too few bytes": "more bytes arrive",
    "too many bytes": "wait for each other", "misaligned": "not aligned to its swizzle",
    "no wait": "has not waited for", "two arrivals": "more arrivals",
    "different operands": "different operands",
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_the_emulation_tells_right_from_wrong(cuda_library: Path, misuse: str) -> None:
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).emulation_hopper_misuse({}))"
    done = subprocess.run(
        [sys.executable, "-c", code.format(list(MISUSES).index(misuse)), str(cuda_library)],
        capture_output=True,
        text=True,
    )
    expected = MISUSES[misuse]
    if expected in ("right", "differs"):
        assert done.returncode == 0, done.stderr
        assert (int(done.stdout) == 0) == (expected == "right")
    else:
        assert done.returncode == -signal.SIGABRT
        assert expected in done.stderr


def hopper(monkeypatch: pytest.MonkeyPatch, wanted: str = "1", capability: str = "90") -> None:
    """An emulated device of a compute capability, and the switch."""
    monkeypatch.setenv("DGEMMA_EMULATION_CAPABILITIES", capability)
    monkeypatch.setenv("DGEMMA_CUDA_HOPPER", wanted)


def thorough(*values: Any) -> Any:
    """A case that `make test` leaves to `make test-cuda`: emulation is slow."""
    return pytest.param(*values, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    ("name", "outtype", "limit"),
    [
        ("small", "q4_0", 0.03),
        thorough("odd", "nvfp4", 0.03),
        thorough("wide", "q4_k_m", 0.03),
        thorough("wide", "q6_k", 0.03),
        thorough("small", "bf16", 4e-3),
        ("odd", "f32", 4e-3),
        thorough("long", "f32", 4e-3),
    ],
)
def test_models_agree_with_the_cpu(
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    outtype: str,
    limit: float,
) -> None:
    """Experts and head still round activations to int8, where their weights are integers."""
    path = gguf_file(name, outtype)
    expected = canvas_logits(open_model(path, n_ctx=256), name)
    common = canvas_logits(cuda(path, n_batch=16), name)
    hopper(monkeypatch)
    actual = canvas_logits(cuda(path, n_batch=16), name)
    assert not np.array_equal(actual, common)
    assert median_error(actual, expected) < limit
    assert (actual.argmax(-1) == expected.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize(
    ("name", "outtype", "bound", "close"),
    [
        ("small", "f32", 1e-3, 2e-2),  # narrow soft embeddings, which drop as much
        ("odd", "f32", 0.0, 2e-3),  # soft embeddings take every row
        thorough("wide", "q6_k", 1e-3, 0.05),
        thorough("small", "q4_0", 0.0, 0.05),
    ],
)
def test_a_step_draws_as_on_the_cpu(
    cuda_library: Path,
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    outtype: str,
    bound: float,
    close: float,
) -> None:
    """Statistics, draw and soft embedding: entropies and draws of two steps, of which the second is
    conditioned on the first."""
    path = gguf_file(name, outtype)

    def steps(backend: str) -> list[Any]:
        with Model(path, backend=backend) as model:
            options = {"type_k": "f32", "type_v": "f32", "soft_embedding_bound": bound}
            session = Session(model, n_ctx=256, n_batch=32, **options)
            session.prefill(list(range(2, 22)))
            session.begin_canvas(model.info.sampling, seed=7)
            return [session.step(), session.step()]

    expected = steps("cpu")
    hopper(monkeypatch)
    monkeypatch.setenv("DGEMMA_CUDA_LIBRARY", str(cuda_library))
    actual = steps("cuda")
    for there, here in zip(actual, expected, strict=True):
        assert np.median(np.abs(there.entropies - here.entropies)) < close
        assert (there.tokens == here.tokens).mean() > 0.8


@pytest.mark.parametrize(("wanted", "capability"), [("0", "90"), ("1", "80"), ("1", "100")])
def test_other_devices_keep_the_common_path(
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    capability: str,
) -> None:
    path = gguf_file("small", "q4_0")
    common = canvas_logits(cuda(path), "small", n_prompt=3)
    hopper(monkeypatch, wanted, capability)
    assert np.array_equal(canvas_logits(cuda(path), "small", n_prompt=3), common)
