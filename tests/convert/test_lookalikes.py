"""What people give in place of a checkpoint or an adapter, and what they are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dgemma_convert import ConvertError, convert
from support.checkpoints import SPECS
from support.conversions import edit_tensors, fails

SPEC = SPECS["small"]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = "<html><body>404: not found</body></html>"
MODULE = "model.decoder.layers.0.self_attn.q_proj"


@pytest.fixture
def whole(source: Path, out: Path) -> bytes:
    """The file that the undamaged checkpoint becomes."""
    convert(source, out / "whole.gguf", "f32", progress=False, model_name="m")
    return (out / "whole.gguf").read_bytes()


def converted(source: Path, out: Path) -> bytes:
    convert(source, out / "again.gguf", "f32", progress=False, model_name="m")
    return (out / "again.gguf").read_bytes()


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (LFS, "is a Git LFS pointer"),
        (PAGE, "is a web page"),
        ("", "(not valid JSON: the file )?is empty"),
    ],
)
def test_small_files_are_looked_at_too(
    source: Path, out: Path, name: str, content: str, match: str
) -> None:
    """A template that is a pointer would be rendered, and every answer be wrong."""
    (source / name).write_text(content)
    fails(source, out, f"{name}: {match}")


def test_an_index_that_is_none(source: Path, out: Path) -> None:
    for content, match in (
        (LFS, "is a Git LFS pointer"),
        (PAGE, "is a web page"),
        ("", "(not valid JSON: the file )?is empty"),
    ):
        (source / "model.safetensors.index.json").write_text(content)
        fails(source, out, rf"index\.json: {match}")


@pytest.mark.parametrize(("content", "what"), [(LFS, "a Git LFS pointer"), (PAGE, "a web page")])
def test_a_model_card_that_is_none_is_only_a_loss(
    source: Path, out: Path, content: str, what: str
) -> None:
    (source / "README.md").write_text(content)
    report = convert(source, out / "model.gguf", "f32", progress=False)
    (note,) = report.notes
    assert f"README.md: the model card cannot be read, and is left out: {source}" in note
    assert f"is {what}" in note


@pytest.mark.parametrize("ending", [".part", ".crdownload", ".incomplete", ".aria2"])
def test_downloads_that_are_not_finished(source: Path, out: Path, ending: str) -> None:
    (source / "model.safetensors").rename(source / f"model.safetensors{ending}")
    fails(source, out, f"but model.safetensors{ending}: its download is not finished")


@pytest.mark.parametrize("n", [4, 100, 2000, -1, -100])
def test_weights_that_were_cut_short(source: Path, out: Path, n: int) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n])
    fails(source, out, "model.safetensors: .*(are no safetensors file|download it again|cut short)")


# ---- Folders -------------------------------------------------------------------------------------


def cached(source: Path, folder: Path) -> Path:
    """The hub's cache folder of a repository: links to blobs."""
    cache = folder / "models--someone--model"
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    return cache


def test_every_level_of_a_hubs_cache(source: Path, out: Path, tmp_path: Path, whole: bytes) -> None:
    hub = tmp_path / "hub"
    cache = cached(source, hub)
    for level in (cache, cache / "snapshots", cache / "snapshots" / "abc123"):
        assert converted(level, out) == whole
        (out / "again.gguf").unlink()
    fails(hub, out, f"not a checkpoint itself; did you mean {cache}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def456")  # whose snapshot is not there: the latest is
    assert converted(cache, out) == whole
    blob = (cache / "snapshots" / "abc123" / "model.safetensors").resolve()
    blob.rename(f"{blob}.incomplete")
    (out / "again.gguf").unlink()
    fails(cache, out, "model.safetensors: is a link to .*, which is not there; download the file")


def test_a_folder_around_the_checkpoint(source: Path, out: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    shutil.move(source, outer / "checkpoint-500")
    fails(outer, out, rf"not a checkpoint itself; did you mean {outer / 'checkpoint-500'}\?")
    shutil.copytree(outer / "checkpoint-500", outer / "checkpoint-900")
    fails(outer, out, f"did you mean {outer / 'checkpoint-500'}, one of 2")


def test_an_archive_and_an_adapter(out: Path, tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK\x03\x04")
    fails(tmp_path / "model.zip", out, "is an archive; unpack it, and give the folder")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    fails(adapter, out, "is an adapter; give the folder of the model, and this one as --lora")


@pytest.mark.parametrize(
    "written",
    ["https://huggingface.co/someone/model", "hf.co/someone/model", "someone/model@main",
     "https://huggingface.co/someone/model/tree/main", "someone/model/"],
)  # fmt: skip
def test_a_repositorys_name_in_other_spellings(out: Path, written: str) -> None:
    fails(Path(written), out, "`dgemma convert someone/model --remote` downloads the repository")


def test_the_home_folder_is_expanded(
    source: Path, out: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(source.parent))
    assert converted(Path("~/source"), out) == whole


# ---- Tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_names_are_taken_off(source: Path, out: Path, whole: bytes, prefix: str) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    edit_tensors(source, wrap)
    assert converted(source, out) == whole


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        (".qweight", "GPTQ or AWQ"),
        (".weight.absmax", "bitsandbytes"),
        (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        (".biases", "MLX"),
    ],
)
def test_quantized_by_others(source: Path, out: Path, name: str, maker: str) -> None:
    edit_tensors(source, lambda tensors: tensors.update({MODULE + name: torch.ones(4)}))
    fails(source, out, f"is quantized by {maker} .*{name}.*; convert the checkpoint that it was")


# ---- Adapters ------------------------------------------------------------------------------------

RANK = 2
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4}


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter; `config` and `factors` change what is in it."""

    def write(config: dict[str, Any], **factors: torch.Tensor) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
        rows = SPEC.heads * SPEC.head_dim
        pair = {"lora_A": torch.ones(RANK, SPEC.hidden), "lora_B": torch.ones(rows, RANK)} | factors
        tensors = {f"base_model.model.{MODULE}.{name}.weight": x for name, x in pair.items()}
        save_file(
            {k: x for k, x in tensors.items() if x.numel()}, folder / "adapter_model.safetensors"
        )
        return folder

    return write


def test_an_adapter_of_another_rank_than_it_says(
    source: Path, out: Path, adapter: Callable[..., Path]
) -> None:
    """lora_alpha over the wrong rank would merge it at another strength."""
    lora = adapter({"r": 8})
    fails(source, out, r"has the rank 2, adapter_config\.json says 8", lora=lora)
    settings = CONFIG | {"r": 8, "rank_pattern": {"q_proj": RANK}}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    convert(source, out / "model.gguf", "f32", lora=lora, progress=False)


def test_adapters_that_are_broken(source: Path, out: Path, adapter: Callable[..., Path]) -> None:
    lora = adapter({}, lora_A=torch.full((RANK, SPEC.hidden), torch.nan))
    fails(source, out, f"tensor .*{MODULE}.lora_A.weight has values that are infinite", lora=lora)


def test_half_an_adapter(source: Path, out: Path, adapter: Callable[..., Path]) -> None:
    lora = adapter({}, lora_B=torch.zeros(0))
    fails(source, out, "is not half of a LoRA pair: lora_B is missing", lora=lora)


def test_folders_of_adapters(source: Path, out: Path, adapter: Callable[..., Path]) -> None:
    lora = adapter({})
    outer = lora.parent / "run"
    shutil.move(lora, outer / "checkpoint-10")
    fails(source, out, rf"did you mean {outer / 'checkpoint-10'}\?", lora=outer)
    with pytest.raises(ConvertError, match="nowhere: no such folder; expected an adapter"):
        convert(source, out / "m.gguf", lora=out / "nowhere", progress=False)
