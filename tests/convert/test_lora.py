"""LoRA adapters merged while converting."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DiffusionGemmaForBlockDiffusion

from dgemma_convert import ConvertError, convert, encode
from support.checkpoints import SPECS

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
        (None, {"bias": "all"}, "bias is set"),
        (None, {"lora_bias": True}, "bias is set"),
        (None, {"layer_replication": [[0, 2]]}, "layer_replication is set"),
        (None, {"init_lora_weights": "pissa_niter_4"}, "changes the weights themselves"),
        (None, {"alpha_pattern": {"q_proj": "1"}}, "expected numbers r"),
        (None, {"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        (None, {"rank_pattern": [3]}, "rank_pattern must be an object"),
        (None, {"r": 0}, "expected numbers r"),
        (None, {"lora_alpha": None}, "expected numbers r"),
        ((f"{BASE}{Q}.lora_B.weight", None), {}, "not half of a LoRA pair"),
        ((f"{BASE}{Q}.lora_A.weight", None), {}, "not half of a LoRA pair"),
        ((f"{BASE}{Q}.lora_A.weight", (RANK, 5)), {}, "the weight has"),
        ((f"{BASE}{Q}.lora_B.weight", (64, 5)), {}, "the weight has"),
        ((f"{BASE}{Q}.lora_A.weight", (RANK,)), {}, "the weight has"),
        ((f"{BASE}more.lora_embedding_A", (2, 2)), {}, "the embedding or the head alone"),
        ((f"{BASE}{Q}.lora_magnitude_vector", (3,)), {}, "needs 64 values"),
        ((f"{BASE}experts.lora_A.weight", (RANK, 64)), {}, "not half of a LoRA pair"),
        ((f"{BASE}input_layernorm.weight", (64,)), {}, "not half of a LoRA pair"),
        (
            (f"{BASE}input_layernorm.weight", (65,)),
            {"modules_to_save": ["input_layernorm"]},
            "replaces none",
        ),
        (
            ("base_model.model.lm_head.weight", (331, 64)),
            {"modules_to_save": ["lm_head"]},
            "the embedding or the head alone",
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


ENCODER = BASE.replace("decoder", "encoder.language_model")


def test_the_encoder_must_have_the_same(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Modules chosen by their last name alone are adapted in both, which have the same weights."""
    source, tensors = checkpoint("small"), adapter_tensors()
    convert(source, tmp_path / "a.gguf", "f32", lora=write_adapter(tmp_path / "a", tensors))
    pair = [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"]
    tensors |= {ENCODER + name: tensors[BASE + name].clone() for name in pair}
    convert(source, tmp_path / "b.gguf", "f32", lora=write_adapter(tmp_path / "b", tensors))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    tensors[ENCODER + pair[1]][3, 2] += 1
    apart = "adapts the encoder apart from the decoder"
    with pytest.raises(ConvertError, match=apart):
        convert(source, tmp_path / "c.gguf", lora=write_adapter(tmp_path / "c", tensors))
    tensors[ENCODER + pair[1]][:] = 0  # as it starts, and stays where nothing is trained
    convert(source, tmp_path / "d.gguf", "f32", lora=write_adapter(tmp_path / "d", tensors))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "d.gguf").read_bytes()

    # Likewise for whole tensors.
    norm, settings = "input_layernorm.weight", {"modules_to_save": ["input_layernorm"]}
    tensors |= {BASE + norm: torch.ones(SPEC.hidden), ENCODER + norm: torch.ones(SPEC.hidden)}
    lora = write_adapter(tmp_path / "e", tensors, **settings)
    convert(source, tmp_path / "e.gguf", "f32", lora=lora)
    assert weights(tmp_path / "e.gguf")["blk.0.attn_norm.weight"].tolist() == [1] * SPEC.hidden
    tensors[ENCODER + norm][0] = 2
    with pytest.raises(ConvertError, match=apart):
        convert(source, lora=write_adapter(tmp_path / "f", tensors, **settings))


def test_vision_is_left_out(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    name = "base_model.model.model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj"
    tensors = adapter_tensors()
    tensors |= {f"{name}.lora_A.weight": torch.ones(RANK, 16)}
    tensors |= {f"{name}.lora_B.weight": torch.ones(16, RANK)}
    lora = write_adapter(tmp_path / "lora", tensors)
    report = convert(checkpoint("small"), tmp_path / "model.gguf", "f32", lora=lora)
    assert report.left_out[-1].what == "adapted vision"
    assert report.left_out[-1].n_tensors == 2


def test_adapters_that_change_are_noticed(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = write_adapter(tmp_path / "lora", adapter_tensors())
    run = encode.run

    def touched(*args: Any) -> None:
        run(*args)
        os.utime(lora / "adapter_model.safetensors", ns=(1, 1))

    monkeypatch.setattr(encode, "run", touched)
    with pytest.raises(ConvertError, match="changed while it was being converted"):
        convert(checkpoint("small"), tmp_path / "model.gguf", "f32", lora=lora)


# ---- What PEFT itself makes ----------------------------------------------------------------------

LINEAR = r".*decoder\.layers\.\d+\.(self_attn\.\w_proj|mlp\.\w+_proj|router\.proj)"
SELF_CONDITIONING = r".*decoder\.self_conditioning\.\w+_proj"


@pytest.mark.parametrize(
    ("settings", "n_adapted"),
    [
        ({"target_modules": LINEAR}, 3 * 8 - 1),
        ({"target_modules": SELF_CONDITIONING, "use_rslora": True}, 3),
        (
            {
                "target_modules": LINEAR,
                "rank_pattern": {r"layers\.1\.mlp\.up_proj": 2, "o_proj": 5},
                "alpha_pattern": {"router.proj": 7, "o_proj": 3},
                "use_rslora": True,
            },
            3 * 8 - 1,
        ),
        ({"target_modules": LINEAR, "use_dora": True}, 3 * 8 - 1),
        (
            {
                "target_modules": r".*decoder.*q_proj",
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                "alpha_pattern": {"experts.gate_up_proj": 5},
            },
            3 * 3,
        ),
        ({"target_modules": [], "target_parameters": ["experts.down_proj"]}, 3),
        (
            {
                "target_modules": r".*decoder.*q_proj",
                "modules_to_save": ["self_conditioning.pre_norm", "self_conditioning.up_proj"],
            },
            3 + 2,
        ),
    ],
)
def test_adapters_of_peft(
    checkpoint: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any], n_adapted: int
) -> None:
    """Merging while converting gives what PEFT's own merging gives."""
    peft = pytest.importorskip("peft", reason="needs the package peft, of the extra `test`")
    source, lora = checkpoint("small"), tmp_path / "lora"
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(source)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "encoder" not in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(lora)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, tmp_path / "merged" / name)

    convert(source, tmp_path / "plain.gguf", "f32")
    convert(source, tmp_path / "adapted.gguf", "f32", lora=lora)
    convert(tmp_path / "merged", tmp_path / "merged.gguf", "f32")
    plain = weights(tmp_path / "plain.gguf")
    found, expected = weights(tmp_path / "adapted.gguf"), weights(tmp_path / "merged.gguf")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, atol=2e-6, err_msg=name)
    changed = [name for name in plain if np.abs(found[name] - plain[name]).max() > 1e-3]
    assert len(changed) == n_adapted


def test_experts_of_older_versions(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Older PEFTs took a stack of experts for (experts, in, out): pairs are transposed."""
    source, name = checkpoint("small"), f"{BASE}experts"
    experts, rows, cols = SPEC.experts, SPEC.hidden, SPEC.expert_mlp
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(RANK * experts, rows, generator=generator)
    b = torch.randn(cols, RANK * experts, generator=generator)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    lora = write_adapter(tmp_path / "lora", tensors, lora_alpha=RANK)
    convert(source, tmp_path / "model.gguf", "f32", lora=lora)
    delta = torch.einsum(
        "o r e, e r i -> e i o", b.reshape(cols, RANK, experts), a.reshape(experts, RANK, rows)
    )
    original = load_file(source / "model.safetensors")["model.decoder.layers.0.experts.down_proj"]
    found = weights(tmp_path / "model.gguf")["blk.0.ffn_down_exps.weight"]
    np.testing.assert_allclose(found, (original + delta).numpy(), rtol=1e-5, atol=1e-5)


def test_for_another_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    name = f"{BASE.replace('layers.0', 'layers.9')}{Q}"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 64)}
    tensors[f"{name}.lora_B.weight"] = torch.ones(64, 1)
    lora = write_adapter(tmp_path / "lora", tensors)
    with pytest.raises(ConvertError, match=r"adapts model\.decoder\.layers\.9\..*does not have"):
        convert(checkpoint("small"), tmp_path / "out.gguf", "f32", lora=lora, progress=False)
