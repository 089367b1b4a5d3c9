"""Checkpoints that are quantized already: repacked bit for bit, or decoded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma_convert import ConvertError, convert
from support.checkpoints import SPECS

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SPEC = SPECS["wide"]
EXPERTS = "model.decoder.layers.{}.experts."
Tensors = dict[str, torch.Tensor]


def random_nvfp4(n_rows: int, n_cols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nibbles (n_rows, n_cols/2) and F8_E4M3 scales (n_rows, n_cols/16), of any bit pattern."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n_rows, n_cols // 2), generator=generator, dtype=torch.uint8)
    bits = torch.randint(0, 127, (n_rows, n_cols // 16), generator=generator, dtype=torch.uint8)
    return packed, bits.view(torch.float8_e4m3fn)


def nvfp4_values(packed: torch.Tensor, scales: torch.Tensor, factor: float) -> torch.Tensor:
    """By the definition: nibble · group scale · factor, the low nibble first."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).long()
    return E2M1[nibbles] * scales.float().repeat_interleave(16, dim=1) * factor


class Made:
    """A checkpoint with separate experts, and what they decode to: (layer, part) → (E, n, m)."""

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        self.folder = folder
        self.values: dict[tuple[int, str], torch.Tensor] = {}
        self.tensors: Tensors = {}
        for path in folder.glob("*.safetensors*"):
            if path.suffix == ".safetensors":
                self.tensors.update(load_file(path))
            path.unlink()
        self.shapes = {
            "gate_proj": (SPEC.expert_mlp, SPEC.hidden),
            "up_proj": (SPEC.expert_mlp, SPEC.hidden),
            "down_proj": (SPEC.hidden, SPEC.expert_mlp),
        }

    def quantize(self, one: Callable[[str, int, int, int], tuple[Tensors, torch.Tensor]]) -> Path:
        """Replaces all experts; `one` makes (tensors, values) from name, rows, columns, seed."""
        seed = 0
        for layer in range(len(SPEC.layers)):
            prefix = EXPERTS.format(layer)
            del self.tensors[prefix + "gate_up_proj"], self.tensors[prefix + "down_proj"]
            for part, shape in self.shapes.items():
                values = []
                for expert in range(SPEC.experts):
                    seed += 1
                    tensors, value = one(f"{prefix}{expert}.{part}", *shape, seed)
                    self.tensors.update(tensors)
                    values.append(value)
                self.values[layer, part] = torch.stack(values)
        self.save()
        return self.folder

    def save(self) -> None:
        save_file(self.tensors, self.folder / "model.safetensors")


def modelopt(name: str, n_rows: int, n_cols: int, seed: int) -> tuple[Tensors, torch.Tensor]:
    packed, scales = random_nvfp4(n_rows, n_cols, seed)
    factor = 1e-4 * (1 + seed / 7)
    tensors = {
        f"{name}.weight": packed,
        f"{name}.weight_scale": scales,
        f"{name}.weight_scale_2": torch.tensor(factor),
        f"{name}.input_scale": torch.tensor(0.5),
    }
    return tensors, nvfp4_values(packed, scales, float(torch.tensor(factor)))


def compressed_tensors(
    name: str, n_rows: int, n_cols: int, seed: int
) -> tuple[Tensors, torch.Tensor]:
    packed, scales = random_nvfp4(n_rows, n_cols, seed)
    factor = torch.tensor([3000.0 + seed])
    tensors = {
        f"{name}.weight_packed": packed,
        f"{name}.weight_scale": scales,
        f"{name}.weight_global_scale": factor,
        f"{name}.input_global_scale": torch.tensor([2.0]),
    }
    return tensors, nvfp4_values(packed, scales, float(1 / factor))


def fp8(shape: Callable[[int, int], tuple[int, ...]], dtype: torch.dtype) -> Any:
    def one(name: str, n_rows: int, n_cols: int, seed: int) -> tuple[Tensors, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 127, (n_rows, n_cols), generator=generator, dtype=torch.uint8)
        signs = torch.randint(0, 2, bits.shape, generator=generator, dtype=torch.uint8)
        weight = (bits | signs << 7).view(torch.float8_e4m3fn)
        scales = (torch.rand(shape(n_rows, n_cols), generator=generator) + 0.5).to(dtype) * 1e-3
        full = scales.float()
        if full.ndim == 2 and full.shape[1] > 1:
            full = full.repeat_interleave(128, 0)[:n_rows].repeat_interleave(128, 1)[:, :n_cols]
        elif full.ndim == 1 and len(full) > 1:
            full = full[:, None]
        suffix = "_scale_inv" if full.shape == weight.shape else "_scale"
        tensors = {f"{name}.weight": weight, f"{name}.weight{suffix}": scales}
        return tensors, weight.float() * full

    return one


@pytest.fixture
def made(checkpoint: Callable[[str], Path], tmp_path: Path) -> Made:
    return Made(checkpoint("wide"), tmp_path / "source")


def by_name(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.reshape([int(n) for n in tensor.shape[::-1]])


@pytest.mark.parametrize("one", [modelopt, compressed_tensors])
@pytest.mark.parametrize("outtype", ["auto", "nvfp4"])
def test_nvfp4_is_repacked_bit_for_bit(made: Made, tmp_path: Path, one: Any, outtype: str) -> None:
    folder = made.quantize(one)
    report = convert(folder, tmp_path / "model.gguf", outtype, progress=False)
    found = by_name(tmp_path / "model.gguf")
    for (layer, part), expected in made.values.items():
        name = f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps"
        tensor, scale = found[f"{name}.weight"], values_of(found[f"{name}.scale"])
        assert tensor.tensor_type.name == "NVFP4"
        if part == "down_proj":
            router = made.tensors[f"model.decoder.layers.{layer}.router.per_expert_scale"]
            scale = scale / router.float().numpy()
        # The products of two floats were rounded once more here and there: by 2^-23 each.
        decoded = values_of(tensor) * scale[:, None, None]
        np.testing.assert_allclose(decoded, expected.numpy(), rtol=4e-7, atol=0)
        # The blocks themselves hold exactly the same numbers.
        for expert in range(SPEC.experts):
            base = f"{EXPERTS.format(layer)}{expert}.{part}.weight"
            scales = made.tensors[f"{base}_scale"]
            raw = tensor.data.reshape(SPEC.experts, -1, 36)[expert]
            np.testing.assert_array_equal(
                raw[:, :4].reshape(-1), scales.view(torch.uint8).flatten().numpy()
            )
    others = {n: t.tensor_type.name for n, t in found.items() if "exps" not in n}
    assert others["blk.0.attn_q.weight"] == ("F32" if outtype == "auto" else "NVFP4")
    left = {o.what: o.n_tensors for o in report.left_out}
    assert left["scales of activations"] == 3 * SPEC.experts * len(SPEC.layers)


def test_nvfp4_to_another_type(made: Made, tmp_path: Path) -> None:
    folder = made.quantize(modelopt)
    convert(folder, tmp_path / "model.gguf", "f32", progress=False)
    found = by_name(tmp_path / "model.gguf")
    for (layer, part), expected in made.values.items():
        decoded = values_of(found[f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight"])
        np.testing.assert_allclose(decoded, expected.numpy(), rtol=4e-7, atol=0)
    router = made.tensors["model.decoder.layers.0.router.per_expert_scale"]
    np.testing.assert_array_equal(
        values_of(found["blk.0.ffn_down_exps.scale"]), router.float().numpy()
    )


@pytest.mark.parametrize(
    "one",
    [
        fp8(lambda n, m: (), torch.float32),
        fp8(lambda n, m: (1,), torch.float32),
        fp8(lambda n, m: (n, 1), torch.bfloat16),
        fp8(lambda n, m: (n,), torch.float16),
        fp8(lambda n, m: (-(-n // 128), -(-m // 128)), torch.float32),
    ],
)
def test_fp8(made: Made, tmp_path: Path, one: Any) -> None:
    folder = made.quantize(one)
    convert(folder, tmp_path / "f32.gguf", "f32", progress=False)
    found = by_name(tmp_path / "f32.gguf")
    for (layer, part), expected in made.values.items():
        decoded = values_of(found[f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight"])
        np.testing.assert_array_equal(decoded, expected.numpy())
    convert(folder, tmp_path / "auto.gguf", "auto", progress=False)
    kept = by_name(tmp_path / "auto.gguf")["blk.0.ffn_up_exps.weight"]
    assert kept.tensor_type.name == "Q8_0"


@pytest.mark.parametrize("kind", ["one", "matrix", "row", "flat rows", "block", "oblong block"])
def test_fp8_in_stacks_and_blocks(
    checkpoint: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Experts in one tensor, as transformers stores them, and scales of every shape."""
    made = Made(checkpoint("wide"), tmp_path / "source")
    generator = torch.Generator().manual_seed(1)
    expected = {}
    for part, name in (("gate_up_proj", "ffn_gate_up_exps"), ("down_proj", "ffn_down_exps")):
        stored = EXPERTS.format(1) + part
        shape = made.tensors[stored].shape
        n, rows, cols = shape
        blocks, size = {
            "one": ((1,), shape),
            "matrix": ((n,), (1, rows, cols)),
            "row": ((n, rows, 1), (1, 1, cols)),
            "flat rows": ((n, rows), (1, 1, cols)),
            "block": ((n, rows // 128, cols // 128), (1, 128, 128)),
            "oblong block": ((n, rows, cols // 32), (1, 1, 32)),
        }[kind]
        weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        scales = torch.rand(blocks, generator=generator) + 0.5
        full = scales.reshape(blocks + (1,) * (3 - len(blocks)))
        for axis, count in enumerate(size):
            full = full.repeat_interleave(count, axis)
        made.tensors[stored], made.tensors[stored + "_scale_inv"] = weight, scales
        expected[f"blk.1.{name}.weight"] = (weight.float() * full).numpy()
    made.save()
    convert(made.folder, tmp_path / "model.gguf", "f32", progress=False)
    found = by_name(tmp_path / "model.gguf")
    for name, values in expected.items():
        np.testing.assert_array_equal(values_of(found[name]), values)


def test_fp8_scales_of_another_shape(made: Made, tmp_path: Path) -> None:
    made.quantize(fp8(lambda n, m: (n, 1), torch.float32))
    change(weight_scale=torch.ones(129, 1))(made.tensors)
    made.save()
    with pytest.raises(ConvertError, match=r"has the shape \[129, 1\]; expected one scale for all"):
        convert(made.folder, tmp_path / "model.gguf", "f32", progress=False)


def change(**tensors: torch.Tensor | None) -> Callable[[Tensors], None]:
    """Replaces parts of the first expert's gate projection; None removes one."""

    def apply(all_tensors: Tensors) -> None:
        for suffix, tensor in tensors.items():
            name = f"{EXPERTS.format(0)}0.gate_proj.{suffix}"
            if tensor is None:
                del all_tensors[name]
            else:
                all_tensors[name] = tensor

    return apply


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (change(weight_scale=None), "quantized, but its scale .* is missing"),
        (change(weight_scale_2=None), "has no place|data type U8"),
        (change(weight_scale_2=torch.tensor(float("nan"))), "positive, finite"),
        (change(weight_scale_2=torch.tensor(0.0)), "positive, finite"),
        (change(weight_scale_2=torch.tensor(3)), "expected a float type"),
        (change(weight_scale=torch.zeros(256, 15).to(torch.float8_e4m3fn)), "one scale for 16"),
        (change(weight_scale=torch.zeros(256, 16)), "expected a U8 matrix and F8_E4M3 scales"),
        (
            change(weight_scale=torch.full((256, 16), -1.0).to(torch.float8_e4m3fn)),
            "negative or not a number",
        ),
        (change(weight=None, weight_scale=None, weight_scale_2=None), "expert 0 of .* is missing"),
        (
            change(
                weight=torch.zeros(256, 32, dtype=torch.uint8),
                weight_scale=torch.zeros(256, 4).to(torch.float8_e4m3fn),
            ),
            "differ in shape or type",
        ),
        (
            change(
                weight=torch.zeros(256, 40, dtype=torch.uint8),
                weight_scale=torch.zeros(256, 5).to(torch.float8_e4m3fn),
            ),
            "not whole blocks of 64",
        ),
    ],
)
def test_damaged(made: Made, tmp_path: Path, damage: Any, match: str) -> None:
    made.quantize(modelopt)
    damage(made.tensors)
    made.save()
    with pytest.raises(ConvertError, match=match):
        convert(made.folder, tmp_path / "model.gguf", "auto", progress=False)
    assert not list(tmp_path.glob("*.gguf"))


def test_config_of_a_quantized_checkpoint_is_accepted(made: Made, tmp_path: Path) -> None:
    made.quantize(modelopt)
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    path.write_text(json.dumps(config))
    convert(made.folder, tmp_path / "model.gguf", "auto", progress=False)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_NVFP4
