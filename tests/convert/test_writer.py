"""The writer of files, by itself."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dgemma_convert import ConvertError
from dgemma_convert.writer import HUGE_PAGE, TensorInfo, Writer


def test_two_conversions_to_one_target(out: Path) -> None:
    tensors = [TensorInfo("a", (4,), gguf.GGMLQuantizationType.F32)]
    target = out / "model.gguf"
    with Writer(target, {}, tensors) as writer:
        with pytest.raises(ConvertError, match="another conversion is writing it"):
            Writer(target, {}, tensors).__enter__()
        writer.write("a", np.ones(4, np.float32).view(np.uint8))
        writer.commit()
    assert gguf.GGUFReader(target).tensors[0].data.tolist() == [1, 1, 1, 1]
    assert list(out.iterdir()) == [target]


def test_an_incomplete_file_is_never_committed(out: Path) -> None:
    tensors = [TensorInfo("a", (4,), gguf.GGMLQuantizationType.F32)]
    with Writer(out / "model.gguf", {}, tensors) as writer:
        writer.write("a", np.ones(3, np.float32).view(np.uint8))
        with pytest.raises(ValueError, match="incomplete"):
            writer.commit()
        with pytest.raises(ValueError, match="more data"):
            writer.write("a", np.ones(2, np.float32).view(np.uint8))
    assert list(out.iterdir()) == []


def test_pieces_of_any_size_become_whole_pages(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors with padding between them, whose pieces come by turns and across page boundaries."""
    rng = np.random.default_rng(5)
    sizes = {"a": HUGE_PAGE + 12, "b": 5 * HUGE_PAGE - 4, "c": 100, "d": 3 * HUGE_PAGE}
    data = {name: rng.integers(0, 256, n, np.uint8) for name, n in sizes.items()}
    tensors = [
        TensorInfo(name, (n // 4,), gguf.GGMLQuantizationType.F32) for name, n in sizes.items()
    ]
    written: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def record(fd: int, view: Any, position: int) -> int:
        written.append((position, len(view)))
        return pwrite(fd, view, position)

    target = out / "model.gguf"
    with Writer(target, {}, tensors) as writer:
        monkeypatch.setattr(os, "pwrite", record)
        for name in ("a", "b", "c"):
            pieces = [*range(0, sizes[name], 1_500_004), sizes[name]]
            for begin, end in pairwise(pieces):
                writer.write(name, data[name][begin:end])
        writer.write("d", data["d"])
        writer.commit()
    read = {tensor.name: tensor.data.view(np.uint8) for tensor in gguf.GGUFReader(target).tensors}
    for name, expected in data.items():
        assert np.array_equal(read[name], expected), name
    boundaries = {position % HUGE_PAGE for position, n in written[1:] if n > 4}
    assert boundaries == {0}  # but for the first, which follows the header, and the magic
    assert sum(n for _, n in written) < sum(sizes.values()) + 100


def test_tensors_written_by_turns(out: Path) -> None:
    tensors = [TensorInfo(name, (600,), gguf.GGMLQuantizationType.F32) for name in "ab"]
    with Writer(out / "model.gguf", {}, tensors) as writer:
        for i in range(3):
            for name in "ba":
                writer.write(name, np.full(200, i + 10 * (name == "b"), np.float32).view(np.uint8))
        writer.commit()
    a, b = gguf.GGUFReader(out / "model.gguf").tensors
    assert a.data.tolist() == [0] * 200 + [1] * 200 + [2] * 200
    assert b.data.tolist() == [10] * 200 + [11] * 200 + [12] * 200
