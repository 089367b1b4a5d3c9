"""Bad input, and faults in the middle: one clear line, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma_convert import ConvertError, convert
from dgemma_convert.safetensors_file import SafetensorsFile
from dgemma_convert.writer import parse_size
from support.conversions import edit_json, edit_tensors, fails

Q_PROJ = "model.decoder.layers.0.self_attn.q_proj.weight"


# ---- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3'; expected 'diffusion_gemma'"),
        ({"model_type": None}, "model_type is missing"),
        ({"text_config": []}, "text_config must be a JSON object"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"canvas_length": 4096}, "canvas_length is 4096; expected less than"),
        ({"canvas_length": 0}, "canvas_length is 0; expected a positive integer"),
        ({"text_config__hidden_size": -64}, "text_config.hidden_size is -64"),
        ({"text_config__hidden_size": "64"}, "hidden_size is '64'"),
        ({"text_config__hidden_size": True}, "hidden_size is True"),
        ({"text_config__vocab_size": 10**30}, "vocab_size is 1000"),
        ({"text_config__per_layer_config": {"2": {"head_dim": 2**31 - 2}}}, "q_proj.weight has"),
        ({"text_config__rms_norm_eps": None}, "rms_norm_eps is missing"),
        (
            {"text_config__layer_types": ["sliding_attention"]},
            "layer_types is .*; expected 3 times",
        ),
        ({"text_config__layer_types": 5}, "layer_types is 5"),
        ({"text_config__top_k_experts": 9}, "top_k_experts is 9; expected at most"),
        ({"text_config__num_key_value_heads": 3}, "4 heads of 16 over 3 key-value heads"),
        ({"text_config__hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"text_config__attention_bias": True}, "attention_bias is True"),
        ({"text_config__use_bidirectional_attention": "all"}, "use_bidirectional_attention is"),
        ({"text_config__per_layer_config": None}, "global_head_dim is missing"),
        ({"text_config__per_layer_config": {"7": {}}}, "layer numbers below 3"),
        ({"text_config__per_layer_config": {"0": {"head_dim": 8}}}, r"head sizes \[8, 16\]"),
        ({"text_config__per_layer_config": {"2": {"hidden_size": 8}}}, "overrides hidden_size"),
        ({"text_config__rope_parameters": None}, "rope_parameters is missing"),
        (
            {"text_config__rope_parameters__full_attention__rope_type": "yarn"},
            "rope_type is 'yarn'; expected 'default' or 'proportional'",
        ),
        ({"text_config__rope_parameters__full_attention__factor": 2.0}, "factor is 2.0"),
    ],
)
def test_config(source: Path, out: Path, values: dict[str, Any], match: str) -> None:
    edit_json(source / "config.json", **values)
    fails(source, out, match)


def test_config_that_is_no_json(source: Path, out: Path) -> None:
    for text in ("", "{", "[" * 100_000, "\x00", "{'a': 1}"):
        (source / "config.json").write_text(text)
        fails(source, out, "config.json: not valid JSON")
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    fails(source, out, "config.json: not a regular file")
    (source / "config.json").unlink()
    fails(source, out, "config.json: reading failed: No such file")


# ---- safetensors -------------------------------------------------------------------------------


def test_folder_without_checkpoint(source: Path, out: Path, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", out, "no such folder")
    (source / "model.safetensors").unlink()
    fails(source, out, "has neither model.safetensors nor")
    (source / "model.safetensors").mkdir()
    fails(source, out, "not a regular file")


def test_missing_shard(source: Path, out: Path) -> None:
    names = load_file(source / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, Q_PROJ: "model-2.safetensors"}}))
    fails(source, out, "names the shard model-2.safetensors, which is missing")
    index.write_text(json.dumps({"weight_map": {**weight_map, "more": "model.safetensors"}}))
    fails(source, out, "says that more is in model.safetensors, but it is not")
    index.write_text(json.dumps({"weight_map": {Q_PROJ: "../model.safetensors"}}))
    fails(source, out, "not a file of the folder")
    del weight_map[Q_PROJ]
    index.write_text(json.dumps({"weight_map": weight_map}))
    fails(source, out, f"says nothing of tensor {Q_PROJ}")
    index.write_text(json.dumps({"weights": 1}))
    fails(source, out, "needs a weight_map")
    index.write_text(json.dumps({"weight_map": {**weight_map, Q_PROJ: "b.safetensors"}}))
    shutil.copy(source / "model.safetensors", source / "b.safetensors")
    convert(source, out / "model.gguf", "f32", progress=False)  # the copy is identical
    tensors = load_file(source / "b.safetensors")
    tensors[Q_PROJ] += 1
    save_file(tensors, source / "b.safetensors")
    (out / "model.gguf").unlink()
    fails(source, out, f"tensor {Q_PROJ} is in two shards, .* and differs")


def test_index_with_a_name_that_no_file_can_have(source: Path, out: Path) -> None:
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "a" * 300}})
    )
    fails(source, out, "File name too long")


def test_file_cut_short(source: Path, out: Path) -> None:
    path = source / "model.safetensors"
    content = path.read_bytes()
    for n, match in (
        (0, "no safetensors file"),
        (7, "no safetensors file"),
        (8, "the header alone needs"),
        (100, "the header alone needs"),
        (len(content) - 1, "cut short"),
    ):
        path.write_bytes(content[:n])
        fails(source, out, match)
    path.write_bytes(content + b"\0")
    fails(source, out, "its tensors end at")


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "n_data", "match"),
    [
        ([], 0, "not a JSON object"),
        ({"a": 1}, 4, "needs dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "needs dtype, shape and data_offsets"),
        ({"a": entry(dtype="F31")}, 4, "unknown data type 'F31'"),
        ({"a": entry(dtype=["F32"])}, 4, "unknown data type"),
        ({"a": entry(shape=[-1])}, 4, "non-negative integers"),
        ({"a": entry(shape=[1.0])}, 4, "non-negative integers"),
        ({"a": entry(shape=[True])}, 4, "non-negative integers"),
        ({"a": entry(shape=5)}, 4, "needs dtype, shape and data_offsets"),
        ({"a": entry(shape=[2])}, 4, r"4 bytes, but F32 \[2\] takes 8"),
        ({"a": entry(shape=[2**62, 2**62])}, 4, "4 bytes, but"),
        ({"a": entry(offsets=[4, 0])}, 4, "cut short or damaged"),
        ({"a": entry(offsets=[0, 8])}, 4, "cut short or damaged"),
        ({"a": entry(offsets=[0, 2**70])}, 4, "cut short or damaged"),
        ({"a": entry(offsets=[0])}, 4, "needs dtype, shape and data_offsets"),
        ({"a": entry(), "b": entry()}, 4, "a and b overlap"),
        ({"a": entry(), "b": entry(offsets=[2, 6])}, 6, "a and b overlap"),
        ({"a": entry(offsets=[4, 8])}, 8, "unaccounted bytes before tensor a"),
    ],
)
def test_header(tmp_path: Path, header: Any, n_data: int, match: str) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(n_data))
    with pytest.raises(ConvertError, match=match):
        SafetensorsFile(path)


def test_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse
    with pytest.raises(ConvertError, match="at most 100000000 are allowed"):
        SafetensorsFile(path)
    raw = b'{"a": {"dtype":"F32"}, "a": {}}'
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(ConvertError, match="names a key twice"):
        SafetensorsFile(path)


def test_tensors_that_do_not_fit_the_table(source: Path, out: Path) -> None:
    original = (source / "model.safetensors").read_bytes()
    for change, match in (
        (lambda t: t.pop(Q_PROJ), f"tensor {Q_PROJ} is missing; expected \\[64, 64\\]"),
        (
            lambda t: t.update({Q_PROJ: torch.zeros(64, 65)}),
            r"has the shape \[64, 65\]; config.json asks for \[64, 64\]",
        ),
        (lambda t: t.update({Q_PROJ: torch.zeros(4096)}), r"has the shape \[4096\]"),
        (lambda t: t.update(more=torch.zeros(2)), r"tensor more \[2\] has no place"),
        (
            lambda t: t.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int32)}),
            "has the data type I32; expected one of F32 F16 BF16",
        ),
        (
            lambda t: t.update({Q_PROJ: torch.zeros(64, 64).to(torch.float8_e4m3fn)}),
            "q_proj.weight is quantized, but its scale .* is missing",
        ),
        (lambda t: t.clear(), "embed_tokens.weight is missing"),
    ):
        (source / "model.safetensors").write_bytes(original)
        edit_tensors(source, change)
        fails(source, out, match)


# ---- Tokenizer and generation defaults ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("tokenizer.json", {"model__type": "Unigram"}, "expected a BPE model"),
        ("tokenizer.json", {"model__byte_fallback": False}, "byte_fallback"),
        ("tokenizer.json", {"model__vocab": []}, "expected a vocab object"),
        ("tokenizer.json", {"model__vocab": {"a": 331}}, "has id 331; .* vocab_size = 331"),
        ("tokenizer.json", {"model__vocab": {"a": -1}}, "no entry of a vocabulary"),
        ("tokenizer.json", {"model__vocab": {"a": "1"}}, "no entry of a vocabulary"),
        ("tokenizer.json", {"model__vocab": {"a": 0, "b": 0}}, "belongs to both"),
        ("tokenizer.json", {"model__vocab": {"\ud800": 300}}, "not valid Unicode"),
        ("tokenizer.json", {"model__vocab": {"a": 300}}, "256 byte tokens"),
        ("tokenizer.json", {"model__merges": ["a"]}, "not a pair"),
        ("tokenizer.json", {"model__merges": [["a", "b", "c"]]}, "not a pair"),
        ("tokenizer.json", {"model__merges": [["no", "token"]]}, "not in the vocabulary"),
        ("tokenizer.json", {"model__merges": [[[], {}]]}, "not a pair"),
        ("tokenizer_config.json", {"bos_token": "<none>"}, "bos_token '<none>' is not in"),
        ("tokenizer_config.json", {"bos_token": ["<bos>"]}, "bos_token .* is not in"),
        ("generation_config.json", {"eos_token_id": [1, 331]}, "eos_token_id 331 is not an id"),
        ("generation_config.json", {"eos_token_id": "1"}, "eos_token_id '1' is not an id"),
        ("generation_config.json", {"eos_token_id": [*range(16)]}, "16 end tokens; the engine"),
        ("generation_config.json", {"t_min": 0}, "t_min is 0; expected a number from 1e-06"),
        ("generation_config.json", {"t_min": "hot"}, "t_min is 'hot'; expected"),
        ("generation_config.json", {"max_denoising_steps": 1.5}, "max_steps is 1.5; expected"),
        ("generation_config.json", {"max_denoising_steps": 100001}, "integer from 1 to 100000"),
        ("generation_config.json", {"stability_threshold": 65}, "an integer from 0 to 64"),
        ("generation_config.json", {"sampler_config": 3}, "sampler_config must be an object"),
    ],
)
def test_tokenizer(source: Path, out: Path, name: str, values: dict[str, Any], match: str) -> None:
    edit_json(source / name, **values)
    fails(source, out, match)


def test_tokenizer_files(source: Path, out: Path) -> None:
    (source / "chat_template.jinja").write_bytes(b"\xff")
    fails(source, out, "chat_template.jinja: not UTF-8")
    (source / "chat_template.jinja").unlink()
    edit_json(source / "tokenizer_config.json", chat_template=[{"name": 1}])
    fails(source, out, "chat_template must be a text or a list")
    (source / "tokenizer.json").unlink()
    fails(source, out, "tokenizer.json: missing")


def test_model_card(source: Path, out: Path) -> None:
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    report = convert(source, out / "broken.gguf", "f32", progress=False)
    (note,) = report.notes
    assert "README.md: the model card cannot be read, and is left out" in note
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    convert(source, out / "model.gguf", "f32", progress=False)
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["general.license"].contents() == "apache-2.0"


# ---- Options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"outtype": "q9_9"}, "unknown outtype 'q9_9'; expected one of auto f32"),
        ({"tensor_types": ["attn"]}, "expected REGEX=TYPE"),
        ({"tensor_types": ["(=q8_0"]}, "bad regular expression"),
        ({"tensor_types": ["a=q9"]}, "'q9' is not a type that can be written"),
        ({"token_embedding_type": "q9"}, "'q9' is not a type"),
        ({"tensor_types": ["attn_q=q8_0", "attn_x=q8_0"]}, "'attn_x': found in the name of no"),
        ({"tensor_types": ["attn_norm=q8_0"]}, "no weight that can have another type"),
    ],
)
def test_options(source: Path, out: Path, options: dict[str, Any], match: str) -> None:
    fails(source, out, match, **options)


def test_sizes() -> None:
    assert [parse_size(s) for s in ("4G", "500m", "10K", "7")] == [4 * 10**9, 5 * 10**8, 10**4, 7]
    for text in ("", "G", "-1G", "1.5G", "1T", "0", "4 G"):
        with pytest.raises(ConvertError, match="expected a number"):
            parse_size(text)
