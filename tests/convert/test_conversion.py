"""What a converted file holds, read back by the `gguf` package."""

from __future__ import annotations

import argparse
import dataclasses
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

from dgemma import _native
from dgemma_convert import ConvertError, cli, convert
from dgemma_convert.metadata import folder_name
from dgemma_convert.tensors import LAYER_ROWS, MODEL_ROWS
from support.checkpoints import CHAT_TEMPLATE, SPECS, Spec, make_checkpoint

PREFIX = "model.decoder."


Folders = Callable[[str], Path]


@pytest.fixture(scope="module", params=["small", "wide", "narrow"])
def case(request: pytest.FixtureRequest, checkpoint: Folders) -> tuple[Path, Spec]:
    return checkpoint(request.param), SPECS[request.param]


@pytest.fixture(scope="module")
def plain(checkpoint: Folders) -> Path:
    return checkpoint("small")


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


def expected_tensors(folder: Path, spec: Spec) -> dict[str, np.ndarray]:
    """What a float32 file must hold."""
    tensors = {name: t.float().numpy() for name, t in stored(folder).items()}
    expected = {row.gguf: tensors[PREFIX + row.checkpoint] for row in MODEL_ROWS}
    for i, kind in enumerate(spec.layers):
        for row in LAYER_ROWS:
            if row.gguf != "attn_v.weight" or kind == "s":
                name = f"{PREFIX}layers.{i}.{row.checkpoint}"
                expected[f"blk.{i}.{row.gguf}"] = tensors[name]
        encoder = f"model.encoder.language_model.layers.{i}.layer_scalar"
        expected[f"blk.{i}.enc_layer_output_scale.weight"] = tensors[encoder]
    n_pairs = spec.full_head_dim // 2
    n_rotated = int(spec.rotary * spec.full_head_dim // 2)
    divisors = np.full(n_pairs, 1e30, np.float32)
    divisors[:n_rotated] = 1
    expected["rope_freqs.weight"] = divisors
    return expected


def test_float32_is_exact(case: tuple[Path, Spec], tmp_path: Path) -> None:
    folder, spec = case
    found = values(run(folder, tmp_path / "model.gguf"))
    expected = expected_tensors(folder, spec)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_bfloat16_is_exact_where_the_checkpoint_is(checkpoint: Folders, tmp_path: Path) -> None:
    folder, spec = checkpoint("narrow"), SPECS["narrow"]
    reader = run(folder, tmp_path / "model.gguf", "bf16")
    assert {t.tensor_type.name for t in reader.tensors} == {"F32", "BF16"}
    for name, value in expected_tensors(folder, spec).items():
        np.testing.assert_array_equal(values(reader)[name], value, err_msg=name)


def test_keys(case: tuple[Path, Spec], tmp_path: Path) -> None:
    folder, spec = case
    reader = run(folder, tmp_path / "model.gguf")
    expected = {
        "general.architecture": "diffusion-gemma",
        "general.type": "model",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "diffusion-gemma.block_count": len(spec.layers),
        "diffusion-gemma.context_length": 4096,
        "diffusion-gemma.embedding_length": spec.hidden,
        "diffusion-gemma.feed_forward_length": spec.mlp,
        "diffusion-gemma.attention.head_count": spec.heads,
        "diffusion-gemma.attention.head_count_kv": [
            spec.kv_heads if kind == "s" else spec.full_kv_heads for kind in spec.layers
        ],
        "diffusion-gemma.attention.key_length": spec.full_head_dim,
        "diffusion-gemma.attention.value_length": spec.full_head_dim,
        "diffusion-gemma.attention.key_length_swa": spec.head_dim,
        "diffusion-gemma.attention.value_length_swa": spec.head_dim,
        "diffusion-gemma.attention.sliding_window": spec.window,
        "diffusion-gemma.attention.sliding_window_pattern": [k == "s" for k in spec.layers],
        "diffusion-gemma.attention.layer_norm_rms_epsilon": pytest.approx(spec.eps, rel=1e-6),
        "diffusion-gemma.attention.causal": False,
        "diffusion-gemma.attention.shared_kv_layers": 0,
        "diffusion-gemma.embedding_length_per_layer_input": 0,
        "diffusion-gemma.rope.freq_base": pytest.approx(spec.full_theta),
        "diffusion-gemma.rope.freq_base_swa": pytest.approx(spec.theta),
        "diffusion-gemma.rope.dimension_count": spec.full_head_dim,
        "diffusion-gemma.rope.dimension_count_swa": spec.head_dim,
        "diffusion-gemma.expert_count": spec.experts,
        "diffusion-gemma.expert_used_count": spec.top_k,
        "diffusion-gemma.expert_feed_forward_length": spec.expert_mlp,
        "diffusion-gemma.final_logit_softcapping": pytest.approx(spec.softcap),
        "diffusion.canvas_length": spec.canvas,
        "diffusion.eb_max_steps": 8,
        "diffusion.eb_t_min": pytest.approx(0.35),
        "diffusion.eb_t_max": pytest.approx(0.75),
        "diffusion.eb_entropy_bound": pytest.approx(0.2),
        "diffusion.eb_stability_threshold": 1,
        "diffusion.eb_confidence_threshold": pytest.approx(0.01),
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eos_token_ids": list(spec.end_tokens),
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {name: key(reader, name) for name in expected} == expected


def test_keys_and_their_types_are_those_of_published_files(plain: Path, tmp_path: Path) -> None:
    """A reader that asks for an int32 array must not find uint32; types from a published file."""
    reader = run(plain, tmp_path / "model.gguf")
    types = {
        name: [t.name for t in field.types]
        for name, field in reader.fields.items()
        if name.startswith(("diffusion-gemma.", "tokenizer."))
    }
    assert types["diffusion-gemma.attention.head_count_kv"] == ["ARRAY", "INT32"]
    assert types["diffusion-gemma.attention.sliding_window_pattern"] == ["ARRAY", "BOOL"]
    assert types["tokenizer.ggml.scores"] == ["ARRAY", "FLOAT32"]
    assert types["tokenizer.ggml.token_type"] == ["ARRAY", "INT32"]
    assert types["tokenizer.ggml.tokens"] == ["ARRAY", "STRING"]
    assert types["tokenizer.ggml.merges"] == ["ARRAY", "STRING"]
    assert types["diffusion-gemma.rope.freq_base"] == ["FLOAT32"]
    assert types["diffusion-gemma.expert_count"] == ["UINT32"]
    assert types["tokenizer.ggml.eos_token_id"] == ["UINT32"]


CARD = """---
license: apache-2.0
license_link: https://ai.google.dev/gemma/docs/gemma_4_license
base_model: google/gemma-4-26B-A4B-it
base_model_relation: finetune
pipeline_tag: text-generation
tags: [diffusion, text]
language: en
datasets: [someone/something]
---
# A model
"""


def test_the_model_card_becomes_keys(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "diffusiongemma-26B-A4B-it"))
    (source / "README.md").write_text(CARD)
    report = convert(source, tmp_path, "f32", progress=False)
    assert report.files == [str(tmp_path / "diffusiongemma-26B-A4B-it-F32.gguf")]
    fields = gguf.GGUFReader(report.files[0]).fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("general.")}
    assert found["general.name"] == "diffusiongemma-26B-A4B-it"
    assert found["general.license"] == "apache-2.0"
    assert found["general.license.link"] == "https://ai.google.dev/gemma/docs/gemma_4_license"
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.repo_url"] == (
        "https://huggingface.co/google/gemma-4-26B-A4B-it"
    )
    assert found["general.dataset.0.organization"] == "Someone"
    assert found["general.tags"] == ["diffusion", "text", "text-generation"]
    assert found["general.languages"] == ["en"]


def test_metadata_file(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    (source / "README.md").write_text(CARD)
    path = tmp_path / "metadata.json"
    own = {
        "general.name": "Mine",
        "general.license": "mit",
        "general.tags": ["new"],
        "general.source.url": "https://example.org",
        "general.base_models": [{"name": "Other", "repo_url": "https://example.org/other"}],
    }
    path.write_text(json.dumps(own))
    report = convert(source, tmp_path, "f32", metadata=path, progress=False)
    assert report.files == [str(tmp_path / "Mine-F32.gguf")]
    fields = gguf.GGUFReader(report.files[0]).fields
    for key in ("general.name", "general.license", "general.tags", "general.source.url"):
        assert fields[key].contents() == own[key]
    assert fields["general.base_model.0.name"].contents() == "Other"
    assert fields["general.languages"].contents() == ["en"]
    report = convert(source, tmp_path, "f32", metadata=path, model_name="Yours", progress=False)
    assert report.files == [str(tmp_path / "Yours-F32.gguf")]
    for values, match in (
        ({"general.colour": "red"}, "'general.colour' cannot be set; expected some of general.a"),
        ({"general.license": 3}, "general.license is '3'; expected a text"),
        ({"general.tags": "new"}, "expected a list of texts"),
        ({"general.base_models": [{"name": 1}]}, "expected a list of objects of texts"),
        ([], "must be a JSON object"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(ConvertError, match=match):
            convert(source, tmp_path, "f32", metadata=path, progress=False)


def test_vocabulary(plain: Path, tmp_path: Path) -> None:
    reader = run(plain, tmp_path / "model.gguf")
    tokenizer = json.loads((plain / "tokenizer.json").read_text())
    tokens, types = key(reader, "tokenizer.ggml.tokens"), key(reader, "tokenizer.ggml.token_type")
    assert {token: i for i, token in enumerate(tokens)} == tokenizer["model"]["vocab"]
    assert key(reader, "tokenizer.ggml.scores") == [-1000.0] * len(tokens)
    merges = [tuple(merge) for merge in tokenizer["model"]["merges"]]
    assert [tuple(m.split(" ")) for m in key(reader, "tokenizer.ggml.merges")] == merges
    by_token = dict(zip(tokens, types, strict=True))
    assert [by_token[t] for t in ("<pad>", "<eos>", "<unk>", "<|turn>", "<turn|>")] == [3] * 5
    assert by_token["<|tool_response>"] == 4  # its text belongs to the answer
    assert [by_token[f"<0x{byte:02X}>"] for byte in range(256)] == [6] * 256
    assert by_token["▁e"] == by_token["<unused0>"] == 1


def edit(folder: Path, tmp_path: Path, name: str, change: Any) -> Path:
    """A copy of the checkpoint with one JSON file changed."""
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(folder, copy)
    content = json.loads((copy / name).read_text())
    change(content)
    (copy / name).write_text(json.dumps(content))
    return copy


def test_merges_as_strings_and_holes_in_the_vocabulary(plain: Path, tmp_path: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        model = tokenizer["model"]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
        del model["vocab"]["<unused1>"]

    source = edit(plain, tmp_path, "tokenizer.json", change)
    as_lists = run(plain, tmp_path / "lists.gguf")
    as_strings = run(source, tmp_path / "strings.gguf")
    name = "tokenizer.ggml.merges"
    assert key(as_strings, name) == key(as_lists, name)
    hole = key(as_lists, "tokenizer.ggml.tokens").index("<unused1>")
    assert key(as_strings, "tokenizer.ggml.tokens")[hole] == f"[PAD{hole}]"
    assert key(as_strings, "tokenizer.ggml.token_type")[hole] == 5


def test_end_tokens_by_name_without_generation_config(plain: Path, tmp_path: Path) -> None:
    source = edit(plain, tmp_path, "tokenizer_config.json", lambda c: None)
    (source / "generation_config.json").unlink()
    reader = run(source, tmp_path / "model.gguf")
    tokens = key(reader, "tokenizer.ggml.tokens")
    ends = [tokens[i] for i in key(reader, "tokenizer.ggml.eos_token_ids")]
    assert ends == ["<eos>", "<turn|>", "<|tool_response>"]
    assert "diffusion.eb_t_min" not in reader.fields


def test_chat_template_in_tokenizer_config(plain: Path, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    source = edit(
        plain, tmp_path, "tokenizer_config.json", lambda c: c.update(chat_template="text")
    )
    (source / "chat_template.jinja").unlink()
    assert key(run(source, tmp_path / "1.gguf"), "tokenizer.chat_template") == "text"
    edit(plain, tmp_path, "tokenizer_config.json", lambda c: c.update(chat_template=templates))
    reader = run(source, tmp_path / "2.gguf")
    assert key(reader, "tokenizer.chat_template") == "A"
    assert key(reader, "tokenizer.chat_template.tool_use") == "B"


def test_both_spellings_of_head_sizes_give_the_same_file(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPECS["small"], layers="sf" * 6, name="twelve")  # two-digit keys
    folder = make_checkpoint(tmp_path / "new", spec)
    old = make_checkpoint(tmp_path / "old", dataclasses.replace(spec, old_keys=True))
    config = json.loads((folder / "config.json").read_text())["text_config"]
    assert "01" in config["per_layer_config"]
    run(folder, tmp_path / "new.gguf", model_name="same")
    run(old, tmp_path / "old.gguf", model_name="same")
    assert (tmp_path / "new.gguf").read_bytes() == (tmp_path / "old.gguf").read_bytes()
    config = json.loads((old / "config.json").read_text())
    config["text_config"]["per_layer_config"] = None
    (old / "config.json").write_text(json.dumps(config))
    run(old, tmp_path / "null.gguf", model_name="same")
    assert (tmp_path / "null.gguf").read_bytes() == (tmp_path / "old.gguf").read_bytes()


def test_copies_of_tied_weights_are_left_out(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "copy"
    shutil.copytree(plain, source)
    tensors = stored(plain)
    tensors["lm_head.weight"] = tensors[PREFIX + "embed_tokens.weight"].clone()
    encoder = "model.encoder.language_model."
    tensors[encoder + "norm.weight"] = tensors[PREFIX + "norm.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    report = convert(source, tmp_path / "model.gguf", "f32", progress=False)
    assert ("copies of tied weights", 2) in [(o.what, o.n_tensors) for o in report.left_out]

    tensors[encoder + "norm.weight"][3] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConvertError, match=r"language_model\.norm\.weight differs"):
        convert(source, tmp_path / "untied.gguf", "f32", progress=False)
    assert not (tmp_path / "untied.gguf").exists()


def test_vision_is_left_out_and_said_to_be(plain: Path, tmp_path: Path) -> None:
    report = convert(plain, tmp_path / "model.gguf", "f32", progress=False)
    vision = {
        name: t.numel() * t.element_size() for name, t in stored(plain).items() if "vision" in name
    }
    (left,) = report.left_out
    assert (left.what, left.n_tensors, left.n_bytes) == (
        "vision",
        len(vision),
        sum(vision.values()),
    )
    assert vision


def test_saved_without_the_head(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "copy"
    shutil.copytree(plain, source)
    tensors = {name.removeprefix("model."): t for name, t in stored(plain).items()}
    save_file(tensors, source / "model.safetensors")
    run(source, tmp_path / "without.gguf", model_name="same")
    run(plain, tmp_path / "with.gguf", model_name="same")
    assert (tmp_path / "without.gguf").read_bytes() == (tmp_path / "with.gguf").read_bytes()


# Relative RMS error of the encoding of a tensor: a little above what plain rounding reaches on
# normal weights.
BOUNDS = {
    "F32": 1e-9, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 8e-3, "Q6_K": 0.025, "Q5_0": 0.055,
    "Q5_K": 0.045, "Q4_0": 0.11, "Q4_K": 0.09, "IQ4_NL": 0.1, "NVFP4": 0.11, "Q2_K": 0.35,
}  # fmt: skip


@pytest.mark.parametrize(
    "outtype", ["f16", "bf16", "q8_0", "q4_0", "nvfp4", "q4_k_m", "q2_k", "iq4_nl"]
)
def test_quantised_values(case: tuple[Path, Spec], tmp_path: Path, outtype: str) -> None:
    folder, spec = case
    reader = run(folder, tmp_path / "model.gguf", outtype)
    found, expected = values(reader), expected_tensors(folder, spec)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    for name in list(found):
        if name.endswith("exps.scale") or types.get(name[: -len("scale")] + "weight") != "NVFP4":
            continue
        found[name[: -len("scale")] + "weight"] *= found.pop(name)
    for i in range(len(spec.layers)):
        for part in ("gate_exps", "up_exps", "down_exps"):
            if types.get(f"blk.{i}.ffn_{part}.weight") == "NVFP4":
                scales = found.pop(f"blk.{i}.ffn_{part}.scale")[:, None, None]
                if part == "down_exps":
                    # The file's number is the product of the multiplier and the router's scale.
                    own = expected[f"blk.{i}.ffn_down_exps.scale"]
                    scales = scales / own[:, None, None]
                    found[f"blk.{i}.ffn_down_exps.scale"] = own
                found[f"blk.{i}.ffn_{part}.weight"] *= scales
        if f"blk.{i}.ffn_gate_exps.weight" in found:
            halves = [found.pop(f"blk.{i}.ffn_{part}_exps.weight") for part in ("gate", "up")]
            found[f"blk.{i}.ffn_gate_up_exps.weight"] = np.concatenate(halves, axis=1)
            types[f"blk.{i}.ffn_gate_up_exps.weight"] = "NVFP4"
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        true = value.astype(np.float64)
        error = np.sqrt(np.mean((found[name] - true) ** 2) / np.mean(true**2))
        assert error <= BOUNDS[types[name]], (name, types[name], error)


def test_norms_scales_and_router_stay_float32(plain: Path, tmp_path: Path) -> None:
    reader = run(plain, tmp_path / "model.gguf", "q4_0", tensor_types=[".*=q8_0"])
    kinds = ("norm", "scale", "ffn_gate_inp", "rope_freqs")
    for tensor in reader.tensors:
        small = any(kind in tensor.name for kind in kinds)
        assert (tensor.tensor_type.name == "F32") == small, tensor.name


def test_types_by_name(plain: Path, tmp_path: Path) -> None:
    reader = run(
        plain,
        tmp_path / "model.gguf",
        "q4_0",
        tensor_types=[r"blk\.0\.attn_.*=q8_0", "attn_v=f16"],
        token_embedding_type="bf16",
    )
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.0.attn_v.weight"] == "Q8_0"
    assert types["blk.1.attn_v.weight"] == "F16"
    assert types["blk.1.attn_q.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "BF16"


def test_widths_that_are_not_whole_blocks_fall_back_and_say_so(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPECS["small"], name="w", mlp=80, expert_mlp=32)
    folder = make_checkpoint(tmp_path / "checkpoint", spec)
    report = convert(folder, tmp_path / "model.gguf", "nvfp4", progress=False)
    used = {t.name: (t.type, t.fallback_from) for t in report.tensors}
    assert used["blk.0.ffn_down_exps.weight"] == ("q4_0", "nvfp4")  # width 32
    assert used["blk.0.ffn_down.weight"] == ("f16", "nvfp4")  # width 80
    assert used["blk.0.ffn_gate.weight"] == ("nvfp4", None)
    # Without a multiplier of its own the router's scale stays what it was.
    scale = values(gguf.GGUFReader(tmp_path / "model.gguf"))["blk.0.ffn_down_exps.scale"]
    np.testing.assert_array_equal(
        scale, stored(folder)[PREFIX + "layers.0.router.per_expert_scale"].numpy()
    )


def test_shards(plain: Path, tmp_path: Path) -> None:
    whole = run(plain, tmp_path / "model.gguf", "q8_0")
    report = convert(plain, tmp_path / "s.gguf", "q8_0", split_max_size=100_000, progress=False)
    assert len(report.files) > 3
    n = len(report.files)
    assert report.files[1] == str(tmp_path / f"s-00002-of-{n:05d}.gguf")
    readers = [gguf.GGUFReader(path) for path in report.files]
    parts: dict[str, np.ndarray] = {}
    for i, reader in enumerate(readers):
        assert key(reader, "split.no") == i
        assert key(reader, "split.count") == n
        assert key(reader, "split.tensors.count") == len(whole.tensors)
        assert (
            sum(tensor.n_bytes for tensor in reader.tensors) <= 100_000 or len(reader.tensors) == 1
        )
        parts.update(values(reader))
    assert "tokenizer.ggml.tokens" in readers[0].fields
    assert "tokenizer.ggml.tokens" not in readers[1].fields
    for name, value in values(whole).items():
        np.testing.assert_array_equal(parts.pop(name), value)
    assert not parts


def test_dry_run_writes_nothing_and_foretells_everything(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    foretold = convert(plain, out, "q4_0", dry_run=True, model_name="tiny", progress=False)
    assert list(out.iterdir()) == []
    assert foretold.files == [str(out / "tiny-Q4_0.gguf")]
    report = convert(plain, out, "q4_0", model_name="tiny", progress=False)
    assert (report.tensors, report.files) == (foretold.tensors, foretold.files)
    assert report.memory_bytes == foretold.memory_bytes
    with _native.Model(report.files[0]) as model:
        need = model.memory(n_ctx=model.info.context_length)
    assert need.weights + need.cache + need.scratch <= foretold.memory_bytes
    reader = gguf.GGUFReader(out / "tiny-Q4_0.gguf")
    assert [(t.name, t.n_bytes) for t in reader.tensors] == [
        (t.name, t.n_bytes) for t in report.tensors
    ]


def test_the_number_of_threads_changes_nothing(plain: Path, tmp_path: Path) -> None:
    for threads in (1, 2, 3):
        run(plain, tmp_path / f"{threads}.gguf", "q4_0", threads=threads)
    first = (tmp_path / "1.gguf").read_bytes()
    assert (tmp_path / "2.gguf").read_bytes() == first
    assert (tmp_path / "3.gguf").read_bytes() == first


# ---- The command --------------------------------------------------------------------------------


def test_command(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = Path(shutil.copytree(plain, tmp_path / "source")), tmp_path / "out"
    out.mkdir()
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    cli.add_convert_parser(subparsers)
    cli.add_synth_parser(subparsers)
    words = ["convert", str(source), "--outtype", "Q8_0", "--outfile", str(out), "--json"]
    args = parser.parse_args(words)
    assert args.run(args) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""  # progress only to a terminal
    assert report["files"] == [str(out / "source-Q8_0.gguf")]
    assert report["n_bytes"] == sum(tensor["n_bytes"] for tensor in report["tensors"])
    assert report["left_out"][0]["what"] == "vision"
    args = parser.parse_args([*words[:-1], "--dry-run"])
    assert args.run(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "token_embd.weight"
    assert lines[-3].startswith("would write ")
    assert lines[-2].startswith("to run it: about ")
    assert lines[-1].startswith("left out: ")
    with pytest.raises(SystemExit):
        parser.parse_args(["convert", str(source), "--outtype", "q9_9"])
    args = parser.parse_args(["convert", "no such repository", "--remote"])
    with pytest.raises(ConvertError, match="no such repository: downloading failed"):
        args.run(args)
    assert folder_name(Path("a/models--org--name/snapshots/0123")) == "name"
