"""Attention with heads as wide as the released ones, behind more tokens than a tile holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dgemma_convert import convert
from support.build import once
from support.checkpoints import Spec, make_checkpoint
from support.engine import open_model

# Heads of 256 with values of their own and a window, and of 512 with a quarter rotated.
RELEASED = Spec("released-heads", hidden=64, layers="sf", heads=4, head_dim=256, kv_heads=2,
                full_head_dim=512, full_kv_heads=1, mlp=64, experts=3, top_k=3, expert_mlp=32,
                window=70, canvas=12, vocab=331, post_norm=0.2, seed=6)  # fmt: skip
# Heads that fill no shape, on fewer heads of keys; a rotation of half of 320.
BETWEEN = Spec("heads-between", hidden=64, layers="fs", heads=6, head_dim=80, kv_heads=1,
               full_head_dim=320, full_kv_heads=2, mlp=64, experts=3, top_k=3, expert_mlp=32,
               window=33, canvas=25, vocab=331, rotary=0.4, post_norm=0.2, seed=7)  # fmt: skip


@pytest.fixture(scope="module")
def heads_file(shared: Path) -> Callable[[Spec], Path]:
    """A file of random weights with the heads of a spec."""

    def made(spec: Spec) -> Path:
        folder = once(shared / "checkpoints" / spec.name, lambda path: make_checkpoint(path, spec))
        return once(shared / "gguf" / f"{spec.name}.gguf",
                    lambda path: convert(folder, path, "f32", progress=False))  # fmt: skip

    return made


def behind(model: Any, spec: Spec, n_prompt: int) -> NDArray[np.float32]:
    """Logits of a canvas behind a prompt, and behind itself."""
    rng = np.random.default_rng(n_prompt)
    prompt, canvas = (rng.integers(5, spec.vocab, n).tolist() for n in (n_prompt, spec.canvas))
    with model.session() as session:
        session.prefill(prompt)
        first = np.asarray(session.canvas_logits(canvas))
        session.prefill(canvas)
        return np.array([first, np.asarray(session.canvas_logits(canvas[::-1]))])


def error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest error of a position's logits, as a share of their spread."""
    return float((np.sqrt(np.square(actual - expected).mean(-1)) / expected.std(-1)).max())


# Of 600 tokens the emulated device gives each block a share.
@pytest.mark.parametrize(
    ("spec", "cache", "n_prompt", "limit"),
    [
        (RELEASED, "f16", 600, 2e-3),
        (RELEASED, "q8_0", 101, 2e-2),
        pytest.param(RELEASED, "bf16", 600, 1e-2, marks=pytest.mark.thorough),
        pytest.param(RELEASED, "q8_0", 600, 2e-2, marks=pytest.mark.thorough),
        (BETWEEN, "bf16", 75, 1e-2),
        pytest.param(BETWEEN, "f16", 75, 2e-3, marks=pytest.mark.thorough),
        pytest.param(BETWEEN, "q8_0", 75, 2e-2, marks=pytest.mark.thorough),
    ],
    ids=lambda value: value.name if isinstance(value, Spec) else str(value),
)
def test_wide_heads_agree_with_the_cpu(
    cuda: Callable[..., Any],
    heads_file: Callable[[Spec], Path],
    spec: Spec,
    cache: str,
    n_prompt: int,
    limit: float,
) -> None:
    path, options = heads_file(spec), {"n_ctx": 1024, "n_batch": 128}
    expected = behind(open_model(path, **options, type_k="f32", type_v="f32"), spec, n_prompt)
    actual = behind(cuda(path, **options, type_k=cache, type_v=cache), spec, n_prompt)
    assert error(actual, expected) < limit
