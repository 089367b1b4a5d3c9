"""LoRA adapters under the names and in the files in which programs other than PEFT leave them."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dgemma_convert import ConvertError, convert
from support.checkpoints import SPECS

SPEC, RANK, ALPHA = SPECS["small"], 4, 6
MODULES = {
    "layers.0.self_attn.q_proj": (SPEC.heads * SPEC.head_dim, SPEC.hidden),
    "layers.1.mlp.down_proj": (SPEC.hidden, SPEC.mlp),
}
Tensors = dict[str, torch.Tensor]


def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {m: (random(RANK, cols), random(rows, RANK)) for m, (rows, cols) in MODULES.items()}


def named(pattern: str) -> Tensors:
    """The factors under names such as "base_model.model.{module}.lora_{part}.weight"."""
    tensors: Tensors = {}
    for module, (a, b) in factors().items():
        kohyas = module.replace(".", "_")
        for part, down, tensor in (("A", "down", a), ("B", "up", b)):
            name = pattern.format(module=module, kohyas=kohyas, part=part, down=down)
            tensors[name] = tensor
    return tensors


def write(folder: Path, tensors: Tensors, settings: dict[str, Any] | None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    if settings is not None:
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **settings}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def expected(checkpoint: Callable[[str], Path], tmp_path: Path) -> bytes:
    """The file with PEFT's own adapter merged."""
    pattern = "base_model.model.model.decoder.{module}.lora_{part}.weight"
    lora = write(tmp_path / "peft", named(pattern), {})
    return merged(checkpoint("small"), tmp_path, lora)


def merged(source: Path, tmp_path: Path, lora: Path) -> bytes:
    path = tmp_path / "merged.gguf"
    convert(source, path, "f32", lora=lora, force=True, progress=False)
    return path.read_bytes()


PEFT = [
    "base_model.model.model.decoder.{module}.lora_{part}.default.weight",
    "base_model.model.model.decoder.{module}.lora_{part}.my_adapter.weight",
    "model.decoder.{module}.lora_{part}.weight",
    "base_model.model.model.language_model.{module}.lora_{part}.weight",
    "base_model.model.language_model.model.{module}.lora_{part}.weight",
    "base_model.model.model.{module}.lora_{part}.weight",
    "{module}.lora_{down}.weight",
]
KOHYA = [
    "lora_te_model_decoder_{kohyas}.lora_{down}.weight",
    "lora_unet_{kohyas}.lora_{down}.weight",
    "lora_model_language_model_{kohyas}.lora_{down}.weight",
]


@pytest.mark.parametrize("pattern", PEFT)
def test_spellings_of_names(
    checkpoint: Callable[[str], Path], tmp_path: Path, expected: bytes, pattern: str
) -> None:
    lora = write(tmp_path / "lora", named(pattern), {})
    assert merged(checkpoint("small"), tmp_path, lora) == expected


@pytest.mark.parametrize("pattern", KOHYA)
def test_kohyas_names_and_strengths(
    checkpoint: Callable[[str], Path], tmp_path: Path, expected: bytes, pattern: str
) -> None:
    tensors = named(pattern)
    for name in list(tensors):
        tensors[name.split(".")[0] + ".alpha"] = torch.tensor(float(ALPHA))
    lora = write(tmp_path / "lora", tensors, None)
    path = (lora / "adapter_model.safetensors").rename(lora / "any-name.safetensors")
    assert merged(checkpoint("small"), tmp_path, lora) == expected
    assert merged(checkpoint("small"), tmp_path, path) == expected  # the file for its folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorch_files(
    checkpoint: Callable[[str], Path], tmp_path: Path, expected: bytes, dtype: torch.dtype
) -> None:
    tensors = named("base_model.model.model.decoder.{module}.lora_{part}.weight")
    lora = write(tmp_path / "lora", tensors, {})
    (lora / "adapter_model.safetensors").unlink()
    torch.save({n: t.to(dtype) for n, t in tensors.items()}, lora / "adapter_model.bin")
    assert merged(checkpoint("small"), tmp_path, lora) == expected


class Hostile:
    """What runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def archive(path: Path, program: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)


def test_pytorch_files_run_nothing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    lora = write(tmp_path / "lora", {"a": torch.ones(1)}, {})
    (lora / "adapter_model.safetensors").unlink()
    path, mark = lora / "adapter_model.bin", tmp_path / "ran"
    for program, match in (
        (pickle.dumps({"a": Hostile(f"touch {mark}")}), "asks for posix.system, which would run"),
        (pickle.dumps([1]), "holds no dictionary of tensors"),
        (pickle.dumps({"a": 1}), "'a' is no tensor"),
        (b"", "cannot be read"),
    ):
        archive(path, program)
        with pytest.raises(ConvertError, match=match):
            convert(checkpoint("small"), tmp_path / "m.gguf", "f32", lora=lora, progress=False)
    path.write_bytes(b"no archive")
    with pytest.raises(ConvertError, match="no PyTorch file of version"):
        convert(checkpoint("small"), tmp_path / "m.gguf", "f32", lora=lora, progress=False)
    torch.save({"a": torch.ones(4, 4).T[:2]}, path)
    with pytest.raises(ConvertError, match=r"not stored in one piece|not half of a LoRA pair"):
        convert(checkpoint("small"), tmp_path / "m.gguf", "f32", lora=lora, progress=False)
    assert not mark.exists()
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("x.hada_w1_a", {}, r"hada_w\) is not of LoRA's mathematics"),
        ("x.lokr_w1", {}, r"lokr_w\) is not of LoRA's mathematics"),
        ("lora_te_x.dora_scale", None, r"dora_scale\) is not of LoRA's mathematics"),
        ("x.lora_A.weight", {"use_qalora": True}, "use_qalora is set"),
        ("x.lora_A.weight", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    ],
)
def test_other_mathematics(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, settings: Any, match: str
) -> None:
    lora = write(tmp_path / "lora", {name: torch.ones(2, 2)}, settings)
    with pytest.raises(ConvertError, match=match):
        convert(checkpoint("small"), tmp_path / "m.gguf", "f32", lora=lora, progress=False)


def test_a_pair_whose_strength_is_unknown(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = write(tmp_path / "lora", named(KOHYA[0]), None)
    with pytest.raises(ConvertError, match=r"says how strong the pair .* is \(lora_alpha\)"):
        convert(checkpoint("small"), tmp_path / "m.gguf", "f32", lora=lora, progress=False)
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"has no adapter_model\.safetensors or adapter_model"):
        convert(checkpoint("small"), tmp_path / "m.gguf", "f32", lora=lora, progress=False)
