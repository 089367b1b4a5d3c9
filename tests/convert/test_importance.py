"""Importance matrices in llama.cpp's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from dgemma.errors import Error
from dgemma.importance import AVERAGE_TOKENS, Importance
from dgemma_convert import ConvertError, convert
from support.checkpoints import SPECS

SPEC = SPECS["wide"]
Q, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_gate_up_exps.weight"
Arrays = dict[str, np.ndarray]


def write(path: Path, tensors: Arrays) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def matrix() -> Arrays:
    """A few columns of the queries matter a thousand times more; so do others for each expert."""
    rng = np.random.default_rng(0)
    n = SPEC.hidden
    columns = np.where(rng.random(n) < 0.05, 1000.0, 1.0)
    by_expert = np.where(rng.random((SPEC.experts, n)) < 0.05, 1000.0, 1.0)
    counts = np.full((SPEC.experts, 1), 1000.0)
    counts[1] = 0  # never met
    return {
        f"{Q}.in_sum2": (columns * 500)[None].astype(np.float32),
        f"{Q}.counts": np.array([[500.0]], np.float32),
        f"{EXPERTS}.in_sum2": (by_expert * counts).astype(np.float32),
        f"{EXPERTS}.counts": counts.astype(np.float32),
    }


def values(path: Path) -> Arrays:
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors
    }


def test_errors_move_to_where_they_do_not_matter(
    checkpoint: Callable[[str], Path], gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    imatrix = write(tmp_path / "imatrix.gguf", matrix())
    path = tmp_path / "model.gguf"
    convert(checkpoint("wide"), path, "q4_k_m", imatrix=imatrix, tensor_types=["attn_q=q4_k"],
            progress=False)  # fmt: skip
    convert(checkpoint("wide"), tmp_path / "plain.gguf", "q4_k_m", tensor_types=["attn_q=q4_k"],
            progress=False)  # fmt: skip
    found, plain = values(path), values(tmp_path / "plain.gguf")
    exact = values(gguf_file("wide", "f32"))
    importance = Importance(imatrix)
    for name, n_matrices in ((Q, 1), (EXPERTS, SPEC.experts)):
        weights = importance.of(name, n_matrices, SPEC.hidden)
        assert weights is not None
        weights = weights.reshape(*((n_matrices, 1) if n_matrices > 1 else (1,)), SPEC.hidden)
        better = np.sum(weights * (found[name] - exact[name]) ** 2)
        assert better < 0.8 * np.sum(weights * (plain[name] - exact[name]) ** 2)
    # Tensors that it says nothing of are what they would be without it.
    np.testing.assert_array_equal(found["blk.0.attn_k.weight"], plain["blk.0.attn_k.weight"])
    fields = gguf.GGUFReader(path).fields
    assert fields["quantize.imatrix.file"].contents() == "imatrix.gguf"
    assert fields["quantize.imatrix.entries_count"].contents() == 2


def test_rarely_met_experts_lean_on_the_average(tmp_path: Path) -> None:
    tensors = matrix()
    importance = Importance(write(tmp_path / "imatrix.gguf", tensors))
    means = importance.of(EXPERTS, SPEC.experts, SPEC.hidden)
    assert means is not None
    sums, counts = tensors[f"{EXPERTS}.in_sum2"], tensors[f"{EXPERTS}.counts"]
    average = sums.sum(0) / counts.sum()
    np.testing.assert_allclose(means[1], average, rtol=1e-5)
    expected = (sums[0] + AVERAGE_TOKENS * average) / (1000 + AVERAGE_TOKENS)
    np.testing.assert_allclose(means[0], expected, rtol=1e-5)
    # Gate and up see the same input as both together.
    gate = importance.of("blk.0.ffn_gate_exps.weight", SPEC.experts, SPEC.hidden)
    np.testing.assert_array_equal(gate, means)
    assert importance.of("blk.0.attn_k.weight", 1, SPEC.hidden) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({f"{Q}.in_sum2": np.ones((1, 9), np.float32)}, "made for another model"),
        ({f"{Q}.in_sum2": -np.ones((1, 256), np.float32)}, "negative or infinite"),
        ({f"{Q}.counts": np.full((1, 1), np.inf, np.float32)}, "negative or infinite"),
        ({f"{Q}.counts": np.ones((1, 1), np.float16)}, "both in f32"),
        ({f"{EXPERTS}.counts": np.ones((3, 1), np.float32)}, "made for another model"),
    ],
)
def test_bad_files(
    checkpoint: Callable[[str], Path], tmp_path: Path, change: Arrays, match: str
) -> None:
    imatrix = write(tmp_path / "imatrix.gguf", {**matrix(), **change})
    with pytest.raises(ConvertError, match=match):
        convert(checkpoint("wide"), tmp_path / "m.gguf", "q4_0", imatrix=imatrix, progress=False)
    assert not (tmp_path / "m.gguf").exists()


def test_files_that_are_none(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Error, match="has no importance matrix"):
        Importance(gguf_file("small"))
    with pytest.raises(Error, match=r"none\.gguf"):
        Importance(tmp_path / "none.gguf")
