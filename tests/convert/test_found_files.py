"""Checkpoints as they are found in the world: what is accepted, and what is said of the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma.cli import main
from dgemma_convert import ConvertError, convert
from support.checkpoints import SPECS
from support.conversions import edit_json, edit_tensors, fails

SPEC = SPECS["small"]
DECODER = "model.decoder."
LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
PAGE = "<!DOCTYPE html><html><body>404: not found</body></html>"
FILES = ["config.json", "tokenizer.json", "model.safetensors"]


@pytest.fixture
def whole(source: Path, out: Path) -> bytes:
    """The file that the undamaged checkpoint becomes."""
    convert(source, out / "whole.gguf", "f32", progress=False, model_name="m")
    return (out / "whole.gguf").read_bytes()


def converted(source: Path, out: Path) -> bytes:
    convert(source, out / "again.gguf", "f32", progress=False, model_name="m", force=True)
    return (out / "again.gguf").read_bytes()


# ---- Something else in place of a file -----------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (LFS, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
        (PAGE, "is a web page, not the file itself; download it again"),
        ("\ufeff" + PAGE, "is a web page"),
    ],
)
def test_not_the_file_itself(source: Path, out: Path, name: str, content: str, match: str) -> None:
    (source / name).write_text(content)
    fails(source, out, f"{name}: {match}")


def test_weights_in_other_formats(source: Path, out: Path, gguf_file: Callable[..., Path]) -> None:
    path = source / "model.safetensors"
    shutil.copy(gguf_file("small"), path)
    fails(source, out, "is a GGUF file; `dgemma quantize` reads those")
    torch.save({"a": torch.ones(2)}, path)
    fails(source, out, "is a PyTorch or ZIP archive")
    path.rename(source / "pytorch_model.bin")
    fails(source, out, "has neither .*, but pytorch_model.bin: weights are read from safetensors")
    fails(gguf_file("small"), out, "is a GGUF file; `dgemma quantize` reads those")


@pytest.mark.parametrize("name", [*FILES, "generation_config.json", "chat_template.jinja"])
def test_dangling_links(source: Path, out: Path, name: str) -> None:
    (source / name).unlink()
    (source / name).symlink_to("../../blobs/0123")
    fails(source, out, rf"{name}: is a link to \.\./\.\./blobs/0123, which is not there")


def test_a_byte_order_mark_is_no_hindrance(source: Path, out: Path, whole: bytes) -> None:
    for name in ("config", "tokenizer", "tokenizer_config", "generation_config"):
        name += ".json"
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    assert converted(source, out) == whole


# ---- Which folder is meant -----------------------------------------------------------------------


def test_a_file_stands_for_its_folder(source: Path, out: Path, whole: bytes) -> None:
    for name in ("config.json", "model.safetensors"):
        assert converted(source / name, out) == whole


def test_a_hubs_cache_folder_stands_for_its_snapshot(
    source: Path, out: Path, tmp_path: Path, whole: bytes
) -> None:
    cache = tmp_path / "models--someone--model"
    new, old = (cache / "snapshots" / name for name in ("abc123", "def456"))
    shutil.copytree(source, new)
    old.mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123\n")
    assert converted(cache, out) == whole
    (cache / "refs" / "main").unlink()
    shutil.rmtree(old)
    assert converted(cache, out) == whole
    shutil.rmtree(new)
    fails(cache, out, "a cache folder without a snapshot")


def test_a_repositorys_name_is_offered(out: Path) -> None:
    offer = "`dgemma convert someone/model --remote` downloads the repository of that name"
    fails(Path("someone/model"), out, f"someone/model: no such folder; .*; {offer}")
    with pytest.raises(ConvertError, match=r"config\.json$"):
        convert(Path("/someone/else/model"), out / "model.gguf", progress=False)


# ---- Shards --------------------------------------------------------------------------------------


def split(source: Path, n: int) -> list[Path]:
    """The weights in `n` shards, without an index."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    paths = [source / f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for i, path in enumerate(paths):
        save_file({name: tensors[name] for name in sorted(tensors)[i::n]}, path)
    return paths


def test_shards_without_an_index(source: Path, out: Path, whole: bytes) -> None:
    paths = split(source, 3)
    assert converted(source, out) == whole
    paths[1].unlink()
    fails(source, out, "the shard model-00002-of-00003.safetensors is missing; download it")
    shutil.copy(paths[0], source / "other-00001-of-00002.safetensors")
    fails(source, out, "has shards of 2 models and no model.safetensors.index.json")


def test_weights_under_another_name(source: Path, out: Path, whole: bytes) -> None:
    (source / "model.safetensors").rename(source / "weights.safetensors")
    (source / "adapter_model.safetensors").write_text("not looked at")
    assert converted(source, out) == whole


def test_all_missing_shards_are_counted(source: Path, out: Path) -> None:
    weight_map = {"a": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fails(source, out, "names the shard a.safetensors and 2 more, which is missing")


def test_identical_copies_in_other_shards(source: Path, out: Path, whole: bytes) -> None:
    first, second = split(source, 2)
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file({**load_file(second), name: tensors[name]}, second)
    report = convert(source, out / "model.gguf", "f32", progress=False, model_name="m")
    left = report.left_out[-1]
    assert (left.what, left.names) == ("copies in other shards", (name,))
    assert (out / "model.gguf").read_bytes() == whole
    save_file({**load_file(second), name: tensors[name] + 1}, second)
    (out / "model.gguf").unlink()
    fails(source, out, f"tensor {name} is in two shards, .* and differs")


# ---- Tensors that change nothing, and those that would -------------------------------------------


def frequencies() -> torch.Tensor:
    pairs = torch.arange(SPEC.head_dim // 2, dtype=torch.float64)
    return (SPEC.theta ** (-2 * pairs / SPEC.head_dim)).float()


HARMLESS = {
    f"{DECODER}rotary_emb.inv_freq": (frequencies(), "rotary tables"),
    f"{DECODER}layers.0.self_attn.rotary_emb.cos_cached": (torch.ones(4, 4), "rotary tables"),
    f"{DECODER}position_ids": (torch.arange(8)[None], "position ids"),
    f"{DECODER}layers.0.self_attn.causal_mask": (torch.ones(4, 4, dtype=torch.bool), "masks"),
    f"{DECODER}embed_tokens.embed_scale": (torch.tensor(SPEC.hidden**0.5), "the embedding's scale"),
    f"{DECODER}layers.0.extra": (torch.zeros(0, 7), "empty tensors"),
}


def test_harmless_tensors_are_left_out_by_name(source: Path, out: Path, whole: bytes) -> None:
    edit_tensors(source, lambda t: t.update({name: value for name, (value, _) in HARMLESS.items()}))
    report = convert(source, out / "model.gguf", "f32", progress=False, model_name="m")
    found = {name: left.what for left in report.left_out for name in left.names}
    assert found == {name: what for name, (_, what) in HARMLESS.items()}
    assert (out / "model.gguf").read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotary_emb.inv_freq", frequencies() * 0.5),
        ("rotary_emb.inv_freq", frequencies()[:-1]),
        ("embed_tokens.embed_scale", torch.tensor(1.0)),
        ("layers.0.self_attn.q_proj.bias", torch.zeros(64)),
    ],
)
def test_what_could_change_the_answer_is_refused(
    source: Path, out: Path, name: str, value: torch.Tensor
) -> None:
    edit_tensors(source, lambda tensors: tensors.update({DECODER + name: value}))
    fails(source, out, f"tensor {DECODER}{name} .* has no place in a DiffusionGemma model")


def test_float64_is_rounded_to_float32(source: Path, out: Path, whole: bytes) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})

    edit_tensors(source, widen)
    assert converted(source, out) == whole
    name = f"{DECODER}layers.0.self_attn.q_proj.weight"
    edit_tensors(source, lambda tensors: tensors[name].view(-1)[5:6].fill_(1e300))
    fails(source, out, f"tensor {name}: has values that are infinite or no numbers")


# ---- What would answer wrongly -------------------------------------------------------------------


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0", "q4_k_m", "nvfp4", "auto"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.weight", "layers.0.router.scale"])
def test_no_numbers_in_any_type(
    checkpoint: Callable[[str], Path], tmp_path: Path, outtype: str, bad: float, name: str
) -> None:
    source = Path(shutil.copytree(checkpoint("narrow"), tmp_path / "source"))
    edit_tensors(source, lambda tensors: tensors[DECODER + name].view(-1)[3:4].fill_(bad))
    (tmp_path / "out").mkdir()
    match = f"tensor {DECODER}{name}: .*(infinite or no|not finite|finite)"
    fails(source, tmp_path / "out", match, outtype)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"normalizer": {"type": "NFKC"}}, 'the normalizer is {"type": "NFKC"}; expected Gemma'),
        ({"normalizer": None}, "the normalizer is null"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, 'the pre_tokenizer is {"type": "ByteLevel"}'),
        ({"model__dropout": 0.1}, "model.dropout is 0.1"),
        ({"model__ignore_merges": True}, "model.ignore_merges is True"),
        ({"model__continuing_subword_prefix": "##"}, "continuing_subword_prefix is '##'"),
    ],
)
def test_another_kind_of_tokenizer(source: Path, out: Path, values: dict, match: str) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    for name, value in values.items():
        place = content["model"] if name.startswith("model__") else content
        place[name.removeprefix("model__")] = value
    (source / "tokenizer.json").write_text(json.dumps(content))
    fails(source, out, match)


def test_sequences_of_one_step_are_that_step(source: Path, out: Path, whole: bytes) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]]}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": []}
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert converted(source, out) == whole


def test_fewer_tokens_than_rows(source: Path, out: Path) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    unused = [token for token in vocabulary if token.startswith("<unused")]
    assert len(unused) == 2
    for token in unused:
        del vocabulary[token]
    (source / "tokenizer.json").write_text(json.dumps(content))
    report = convert(source, out / "model.gguf", "f32", progress=False)
    assert report.notes[0].endswith("2 rows of the embedding have no token: they are written as "
                                    "unused ones")  # fmt: skip
    edit_json(source / "config.json", text_config__vocab_size=SPEC.vocab * 2)
    edit_tensors(source, lambda t: t.update(
        {f"{DECODER}embed_tokens.weight": torch.ones(SPEC.vocab * 2, SPEC.hidden)}
    ))  # fmt: skip
    (out / "model.gguf").unlink()
    fails(source, out, "tokens for the 662 rows of the embedding; it belongs to another model")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text_config__rope_scaling": {"type": "linear"}}, "text_config.rope_scaling is .*linear"),
        ({"text_config__attn_logit_softcapping": 50.0}, "attn_logit_softcapping is '50.0'"),
        ({"text_config__num_kv_shared_layers": 2}, "num_kv_shared_layers is 2; expected 0"),
        ({"encoder_only": True}, "encoder_only is 'True', which this converter does not know"),
        (
            {"text_config__rope_parameters__full_attention__attention_factor": 2.0},
            "attention_factor is '2.0', which",
        ),
    ],
)
def test_keys_that_are_not_understood(source: Path, out: Path, values: dict, match: str) -> None:
    edit_json(source / "config.json", **values)
    fails(source, out, match)


def test_keys_that_change_nothing(source: Path, out: Path, whole: bytes) -> None:
    edit_json(
        source / "config.json",
        use_cache=True,
        unsloth_fixed=True,
        text_config__rope_scaling={},
        text_config__attention_k_eq_v=True,
        text_config__some_flag=False,
        text_config__vocab_size_per_layer_input=SPEC.vocab,
    )
    assert converted(source, out) == whole


# ---- Chat templates ------------------------------------------------------------------------------


def template(path: Path, name: str = "tokenizer.chat_template") -> str:
    return str(gguf.GGUFReader(path).fields[name].contents())


def test_places_of_the_chat_template(source: Path, out: Path) -> None:
    text = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    more = source / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text(text + "{# tools #}")
    convert(source, out / "model.gguf", "f32", progress=False)
    assert template(out / "model.gguf") == text
    assert template(out / "model.gguf", "tokenizer.chat_template.tool_use") == text + "{# tools #}"
    (more / "tool_use.jinja").write_text("{% broken")
    (out / "model.gguf").unlink()
    fails(source, out, "the chat template 'tool_use' cannot render a message")


@pytest.mark.parametrize(
    "text", ["{% for m in messages %}", "{{ raise_exception('no') }}", "{{ messages | nothing }}"]
)
def test_a_chat_template_that_does_not_render(source: Path, out: Path, text: str) -> None:
    (source / "chat_template.jinja").write_text(text)
    fails(source, out, "the chat template cannot render a message")


# ---- Targets -------------------------------------------------------------------------------------


def test_targets_in_words(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "link.gguf").symlink_to(out / "none")
    for target, match in (
        ("-", "-: the result cannot go to standard output; name a file"),
        (str(out / "link.gguf"), "is a symbolic link"),
        ("/dev/null", "is a device"),
    ):
        command = ["convert", str(source), "--outtype", "f32", "--force", "--outfile", target]
        assert main(command) == 1
        assert match in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["link.gguf"]
    long = out / ("x" * 250 + ".gguf")
    convert(source, long, "f32", progress=False)
    assert long.read_bytes()[:4] == b"GGUF"


def test_what_the_engine_would_refuse_is_not_written(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma_convert.conversion.checkpoint_keys", lambda *_: {})
    fails(source, out, "the engine would refuse what was written: ")
    fails(source, out, "the engine would refuse what was written: ", split_max_size=80_000)
