"""What a session collects for importance matrices, against NumPy's own sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.errors import CancelledError
from dgemma.values import Activations
from support import engine
from support.checkpoints import SPECS
from support.numpy_model import F64, NumpyModel
from support.reference import read_gguf


class Summing(NumpyModel):
    """Adds up what the engine should."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sums: dict[str, F64] = {}
        self.counts: dict[str, F64] = {}

    def layers(self, x: F64, encoding: bool) -> F64:
        self.encoding = encoding
        return super().layers(x, encoding)

    def meets(self, name: str, x: F64, matrix: int = 0) -> None:
        layer, _, what = name.removeprefix("blk.").partition(".")
        if what == "ffn_gate_inp":
            return  # the router: never quantized
        # Of its last layer, the encoder needs only keys and values.
        last = what and int(layer) == self.n_layers - 1
        if self.encoding and last and what not in ("attn_k", "attn_v"):
            return
        weight = self.w[name + ".weight"]
        n_matrices = len(weight) if weight.ndim == 3 else 1
        sums = self.sums.setdefault(name + ".weight", np.zeros((n_matrices, x.shape[1])))
        sums[matrix] += (x**2).sum(0)
        counts = self.counts.setdefault(name + ".weight", np.zeros(n_matrices))
        counts[matrix] += len(x)


def collected(path: Path, name: str, **options: Any) -> dict[str, Activations]:
    prompt, canvases = engine.random_tokens(name, 29, n_canvases=2)
    with engine.open_model(path, n_batch=16, **options) as llm:
        session = llm.session()
        session.start_collecting()
        engine.conversation(session, prompt, canvases)
        return session.collected()


@pytest.mark.parametrize("name", ["small", "odd"])
def test_sums_and_counts(gguf_file: Callable[..., Path], name: str) -> None:
    path = gguf_file(name)
    keys, tensors = read_gguf(path)
    judge = Summing(keys, tensors)
    prompt, canvases = engine.random_tokens(name, 29, n_canvases=2)
    engine.conversation(judge, prompt, canvases)
    found = collected(path, name)
    assert set(found) == set(judge.sums)
    for tensor, activations in found.items():
        np.testing.assert_array_equal(activations.counts, judge.counts[tensor], tensor)
        expected = judge.sums[tensor]
        np.testing.assert_allclose(
            activations.sums, expected, rtol=2e-3, atol=1e-3 * expected.mean(), err_msg=tensor
        )


def test_threads_and_quantized_weights(gguf_file: Callable[..., Path]) -> None:
    """The sums depend on no thread; in a file of separate gate and up experts both are there."""
    one = collected(gguf_file("wide", "nvfp4"), "wide")
    three = collected(gguf_file("wide", "nvfp4"), "wide", n_threads=3)
    for tensor, activations in one.items():
        np.testing.assert_array_equal(activations.sums, three[tensor].sums)
        np.testing.assert_array_equal(activations.counts, three[tensor].counts)
    gate, up = (one[f"blk.0.ffn_{kind}_exps.weight"] for kind in ("gate", "up"))
    np.testing.assert_array_equal(gate.sums, up.sums)
    # 29 prompt tokens, 4 canvas passes and 2 commits, each token at top_k experts
    spec = SPECS["wide"]
    assert gate.counts.sum() == (29 + 6 * spec.canvas) * spec.top_k
    assert len(one["blk.0.ffn_down_exps.weight"].counts) == spec.experts


def test_starting_and_stopping(gguf_file: Callable[..., Path]) -> None:
    prompt, canvases = engine.random_tokens("small", 9)
    with engine.open_model(gguf_file("small")) as llm:
        session = llm.session()
        assert session.collected() == {}
        session.prefill(prompt)
        session.start_collecting()
        assert all(a.counts.sum() == 0 for a in session.collected().values())
        session.begin_canvas(seed=1)
        session.step()
        first = session.collected()["token_embd.weight"]
        assert first.counts.tolist() == [SPECS["small"].canvas]
        session.cancel()
        with pytest.raises(CancelledError):
            session.canvas_logits(canvases[0])
        session.start_collecting()
        assert session.collected()["token_embd.weight"].counts.tolist() == [0]
        session.stop_collecting()
        session.canvas_logits(canvases[0])
        assert session.collected() == {}
        session.stop_collecting()
