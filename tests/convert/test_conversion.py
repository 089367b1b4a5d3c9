"""What a converted file holds, read back by the `gguf` package."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import save_file

from dgemma import _native
from dgemma_convert import ConvertError, cli, convert
from dgemma_convert.metadata import folder_name
from dgemma_convert.tensors import LAYER_ROWS, MODEL_ROWS
from support.checkpoints import SPECS, Spec, make_checkpoint
from support.conversions import key, run, stored, values

PREFIX = "model.decoder."


Folders = Callable[[str], Path]


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
def test_quantized_values(case: tuple[Path, Spec], tmp_path: Path, outtype: str) -> None:
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
