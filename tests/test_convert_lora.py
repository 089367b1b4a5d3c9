"""LoRA adapters merged while converting."""

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

from checkpoints import SPECS
from dgemma_convert import ConvertError, convert

SPEC, RANK = SPECS["small"], 4
BASE = "base_model.model.model.decoder.layers.0."
Q, DOWN = "self_attn.q_proj", "mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def adapter_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {Q: (SPEC.heads * SPEC.head_dim, SPEC.hidden), DOWN: (SPEC.hidden, SPEC.mlp)}
    tensors: Tensors = {}
    for module, (n_rows, n_cols) in shapes.items():
        tensors[f"{BASE}{module}.lora_A.weight"] = torch.randn(RANK, n_cols, generator=generator)
        tensors[f"{BASE}{module}.lora_B.weight"] = torch.randn(n_rows, RANK, generator=generator)
    return tensors


def write_adapter(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("settings", "scale", "factor"),
    [({}, 1.0, 6 / RANK), ({}, -0.5, -3 / RANK), ({"use_rslora": True}, 1.0, 6 / RANK**0.5)],
)
def test_merged(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    settings: dict[str, Any],
    scale: float,
    factor: float,
) -> None:
    source, tensors = checkpoint("small"), adapter_tensors()
    lora = write_adapter(tmp_path / "lora", tensors, **settings)
    options: dict[str, Any] = {"lora": lora, "lora_scale": scale, "progress": False}
    convert(source, tmp_path / "model.gguf", "f32", **options)
    convert(source, tmp_path / "plain.gguf", "f32", progress=False)
    found, plain = weights(tmp_path / "model.gguf"), weights(tmp_path / "plain.gguf")
    original = load_file(source / "model.safetensors")
    for name, module in (("attn_q", Q), ("ffn_down", DOWN)):
        weight = original[f"model.decoder.layers.0.{module}.weight"].double()
        a = tensors[f"{BASE}{module}.lora_A.weight"].double()
        b = tensors[f"{BASE}{module}.lora_B.weight"].double()
        expected = (weight + factor * (b @ a)).numpy()
        del plain[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(
            found.pop(f"blk.0.{name}.weight"), expected, rtol=1e-5, atol=1e-5
        )
    for name, value in plain.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("change", "settings", "match"),
    [
        (None, {"peft_type": "IA3"}, "not a LoRA adapter"),
        (None, {"use_dora": True}, "use_dora is set"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        (None, {"bias": "all"}, "bias is set"),
        (None, {"r": 0}, "expected numbers r"),
        (None, {"lora_alpha": None}, "expected numbers r"),
        ((f"{BASE}{Q}.lora_B.weight", None), {}, "not half of a LoRA pair"),
        ((f"{BASE}{Q}.lora_A.weight", None), {}, "not half of a LoRA pair"),
        ((f"{BASE}{Q}.lora_A.weight", (RANK, 5)), {}, "the weight has"),
        ((f"{BASE}{Q}.lora_B.weight", (64, 5)), {}, "the weight has"),
        ((f"{BASE}{Q}.lora_A.weight", (RANK,)), {}, "the weight has"),
        ((f"{BASE}more.lora_embedding_A", (2, 2)), {}, "not half of a LoRA pair"),
        (
            (f"{BASE.replace('decoder', 'encoder.language_model')}{Q}.lora_A.weight", (RANK, 64)),
            {},
            "adapts the encoder apart from the decoder",
        ),
    ],
)
def test_refused(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    change: tuple[str, tuple[int, ...] | None] | None,
    settings: dict[str, Any],
    match: str,
) -> None:
    tensors = adapter_tensors()
    if change is not None:
        name, shape = change
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.ones(shape)
    lora = write_adapter(tmp_path / "lora", tensors, **settings)
    with pytest.raises(ConvertError, match=match):
        convert(checkpoint("small"), tmp_path / "out.gguf", "f32", lora=lora, progress=False)
    assert not (tmp_path / "out.gguf").exists()


def test_for_another_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    name = f"{BASE.replace('layers.0', 'layers.9')}{Q}"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 64)}
    tensors[f"{name}.lora_B.weight"] = torch.ones(64, 1)
    lora = write_adapter(tmp_path / "lora", tensors)
    with pytest.raises(ConvertError, match=r"adapts model\.decoder\.layers\.9\..*does not have"):
        convert(checkpoint("small"), tmp_path / "out.gguf", "f32", lora=lora, progress=False)
