"""GGUF to GGUF, and the models with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dgemma import _native
from dgemma_convert import ConvertError, convert, encode, quantize
from dgemma_convert.policy import MIXES
from dgemma_convert.synth import PRESETS, preset_tensors, synthesize
from dgemma_convert.synth_vocabulary import synthetic_vocabulary

Converted = Callable[..., Path]


@pytest.mark.parametrize("outtype", ["q4_0", "nvfp4", "q4_k_m", "f32", "auto"])
def test_the_way_over_a_file_gives_the_same_file(
    gguf_file: Converted, tmp_path: Path, outtype: str
) -> None:
    """float32 holds the checkpoint exactly, so nothing may get lost on the way."""
    quantize(gguf_file("wide", "f32"), tmp_path / "out.gguf", outtype, progress=False)
    assert (tmp_path / "out.gguf").read_bytes() == gguf_file("wide", outtype).read_bytes()


def test_a_copy_is_a_copy(gguf_file: Converted, tmp_path: Path) -> None:
    for outtype in ("nvfp4", "q4_k_m"):
        source = gguf_file("wide", outtype)
        report = quantize(source, tmp_path / "copy.gguf", "auto", force=True, progress=False)
        copy = gguf.GGUFReader(tmp_path / "copy.gguf")
        original = gguf.GGUFReader(source)
        assert [t.name for t in copy.tensors] == [t.name for t in original.tensors]
        for a, b in zip(copy.tensors, original.tensors, strict=True):
            assert a.tensor_type == b.tensor_type
            np.testing.assert_array_equal(a.data, b.data, err_msg=a.name)
        for name, field in original.fields.items():
            if name != "general.file_type":
                assert copy.fields[name].contents() == field.contents(), name
                assert copy.fields[name].types == field.types, name
        assert report.files == [str(tmp_path / "copy.gguf")]


def test_multipliers_are_applied_when_nvfp4_becomes_another_type(
    gguf_file: Converted, tmp_path: Path
) -> None:
    source = gguf_file("wide", "nvfp4")
    with pytest.raises(ConvertError, match=r"is q8_0 already; .* --allow-requantize"):
        quantize(source, tmp_path / "f32.gguf", "f32", progress=False)
    quantize(source, tmp_path / "f32.gguf", "f32", allow_requantize=True, progress=False)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
    exact = {t.name: t.data for t in gguf.GGUFReader(gguf_file("wide", "f32")).tensors}
    assert "blk.0.attn_q.scale" not in tensors
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_up.weight"):
        error = np.sqrt(np.mean((tensors[name] - exact[name]) ** 2) / np.mean(exact[name] ** 2))
        assert error < 0.11
    gate_up = exact["blk.0.ffn_gate_up_exps.weight"]
    gate = tensors["blk.0.ffn_gate_exps.weight"]
    half = gate_up[:, : gate.shape[1]]
    assert np.sqrt(np.mean((gate - half) ** 2) / np.mean(half**2)) < 0.11


def test_shards_in_and_out(gguf_file: Converted, tmp_path: Path) -> None:
    source = gguf_file("wide", "f32")
    split = quantize(
        source, tmp_path / "part.gguf", "auto", split_max_size=4_000_000, progress=False
    )
    assert len(split.files) > 2
    quantize(Path(split.files[0]), tmp_path / "whole.gguf", "auto", progress=False)
    assert (tmp_path / "whole.gguf").read_bytes() == source.read_bytes()


def test_bad_files(gguf_file: Converted, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(ConvertError, match=r"none\.gguf"):
        quantize(tmp_path / "none.gguf", out, "q4_0", progress=False)
    source = tmp_path / "cut.gguf"
    source.write_bytes(gguf_file("small").read_bytes()[:-1000])
    with pytest.raises(ConvertError, match=r"cut\.gguf"):
        quantize(source, out, "q4_0", progress=False)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tensor("a", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConvertError, match="not a DiffusionGemma model"):
        quantize(tmp_path / "other.gguf", out, "q4_0", progress=False)
    assert not out.exists()


def test_input_that_changes(
    gguf_file: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is cut short while it is read ends the conversion, not the process."""
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    run = encode.run

    def touched(*args: Any) -> None:
        run(*args)
        os.utime(source, ns=(1, 1))

    def cut_short(*args: Any) -> None:
        os.truncate(source, source.stat().st_size // 2)
        run(*args)

    for change, match in ((touched, "changed while in use"), (cut_short, "became shorter")):
        source.write_bytes(gguf_file("wide", "f32").read_bytes())
        with monkeypatch.context() as patch:
            patch.setattr(encode, "run", change)
            with pytest.raises(ConvertError, match=match):
                quantize(source, out, "q4_0", progress=False)
        assert list(tmp_path.iterdir()) == [source]


def test_reading_without_the_mapping(gguf_file: Converted, tmp_path: Path) -> None:
    quantize(gguf_file("wide", "f32"), tmp_path / "a.gguf", "auto", split_max_size=3_000_000)
    with _native.File(next(tmp_path.glob("a-00001-of-*.gguf"))) as file:
        for tensor in file.tensors:
            n = len(tensor.data)
            assert np.array_equal(file.read(tensor.name, 0, n), tensor.data)
            assert np.array_equal(file.read(tensor.name, 1, n - 3), tensor.data[1 : n - 2])
            assert len(file.read(tensor.name, n, 0)) == 0
            with pytest.raises(ValueError, match="bytes 1 to"):
                file.read(tensor.name, 1, n)
        with pytest.raises(ValueError, match="has no tensor"):
            file.read("nothing", 0, 1)
        file.check_unchanged()


@pytest.mark.parametrize("damage", ["type", "length"])
def test_multipliers_of_another_kind(gguf_file: Converted, tmp_path: Path, damage: str) -> None:
    source = tmp_path / "damaged.gguf"
    reader = gguf.GGUFReader(gguf_file("wide", "nvfp4"))
    writer = gguf.GGUFWriter(source, "diffusion-gemma")
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        kind = tensor.tensor_type
        if tensor.name == "blk.0.attn_q.scale":
            kind = kind if damage == "length" else gguf.GGMLQuantizationType.F16
            data = data.repeat(2) if damage == "length" else data.astype(np.float16)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConvertError, match=r"attn_q\.scale: .* expected a float32 multiplier"):
        quantize(source, tmp_path / "out.gguf", "q8_0", allow_requantize=True, progress=False)


def test_a_file_may_replace_itself(gguf_file: Converted, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file("wide", "f32").read_bytes())
    quantize(path, path, "q4_0", force=True, progress=False)
    assert path.read_bytes() == gguf_file("wide", "q4_0").read_bytes()


@pytest.mark.parametrize("outtype", ["q4_0", "nvfp4", "q4_k_m"])
def test_random_models_load_and_run(tmp_path: Path, outtype: str) -> None:
    path = tmp_path / "model.gguf"
    report = synthesize("tiny-random", path, outtype, progress=False)
    assert report.n_bytes < path.stat().st_size
    planned = [info for step in preset_tensors("tiny-random", outtype) for info in step.infos]
    assert {(info.name, info.n_bytes) for info in planned} == {
        (tensor.name, tensor.n_bytes) for tensor in report.tensors
    }
    config = PRESETS["tiny-random"]
    with _native.Model(path) as model, _native.Session(model, n_ctx=256) as session:
        session.prefill(list(range(40)))
        logits = session.canvas_logits(np.arange(config.canvas_length))
    assert logits.shape == (config.canvas_length, config.vocab)
    assert 0.5 < logits.std() < 2.0  # alive, and far from the soft-cap


def test_random_models_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed, threads in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        path = tmp_path / name
        synthesize("tiny-random", path, "q4_0", seed=seed, threads=threads, progress=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_released_size_is_right() -> None:
    """25.25 billion weights, of which a token uses about 3.8: the numbers of the model card."""
    config = PRESETS["26b-a4b"]
    expert = 3 * config.hidden * config.expert_feed_forward * len(config.layers)
    attention = sum(
        layer.head_dim
        * config.hidden
        * (2 * config.n_heads + (1 + layer.sliding) * layer.n_kv_heads)
        for layer in config.layers
    )
    dense = 3 * config.hidden * config.feed_forward * (len(config.layers) + 1)
    rest = config.vocab * config.hidden + attention + dense
    assert rest + config.experts * expert == pytest.approx(25.25e9, rel=1e-3)
    assert rest + config.experts_used * expert == pytest.approx(3.8e9, rel=0.02)


def test_synthetic_vocabulary_round_trip() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = synthetic_vocabulary(5000)
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    assert len(ids) == 5000
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    text = "▁Hello,▁Wörld\n日本▁~"
    encoded = [vocabulary.tokens[i] for i in tokenizer.encode(text).ids]
    data = b"".join(
        bytes([int(t[3:5], 16)]) if vocabulary.types[ids[t]] == 6 else t.encode() for t in encoded
    )
    assert data.decode() == text
    with pytest.raises(ConvertError, match="at least"):
        synthetic_vocabulary(100)


def test_every_mix_can_be_written(
    gguf_file: Converted, checkpoint: Converted, tmp_path: Path
) -> None:
    """No type without an encoder, and no tensor that the engine does not know."""
    for outtype in MIXES:
        path = tmp_path / f"{outtype}.gguf"
        report = convert(checkpoint("small"), path, outtype, progress=False)
        assert report.n_parameters > 0
        _native.Model(path).close()
