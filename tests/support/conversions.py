"""Conversions that fail or succeed, and checkpoints that are changed before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma_convert import ConvertError, convert


def fails(source: Path, out: Path, match: str, outtype: str = "f32", **options: Any) -> None:
    """The conversion fails with one line that says `match`, and leaves `out` as it was."""
    before = sorted(out.iterdir())
    with pytest.raises(ConvertError, match=match) as caught:
        convert(source, out / "model.gguf", outtype, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert sorted(out.iterdir()) == before


def edit_json(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; `text_config__x` is x in text_config, None removes a key."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def edit_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def run(src: Path, outfile: Path, outtype: str = "f32", **options: Any) -> gguf.GGUFReader:
    """Converts and opens the result."""
    report = convert(src, outfile, outtype, progress=False, **options)
    assert report.files == [str(outfile)]
    return gguf.GGUFReader(outfile)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def decoded(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Values of a tensor of the file, as float32 in NumPy's order of dimensions."""
    shape = [int(n) for n in tensor.shape[::-1]]
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        bits = tensor.data.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {tensor.name: decoded(tensor) for tensor in reader.tensors}


def key(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()
