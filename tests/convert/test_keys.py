"""The metadata of a converted file: model, card, vocabulary, chat template."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from dgemma_convert import ConvertError, convert
from support.checkpoints import CHAT_TEMPLATE, SPECS, Spec, make_checkpoint
from support.conversions import key, run

Folders = Callable[[str], Path]

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
    for name in ("general.name", "general.license", "general.tags", "general.source.url"):
        assert fields[name].contents() == own[name]
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
