"""Bad input, and faults in the middle: one clear line, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma_convert import ConvertError, convert, encode
from dgemma_convert.safetensors_file import SafetensorsFile
from dgemma_convert.writer import parse_size

Q_PROJ = "model.decoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def source(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("small"), tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def fails(source: Path, out: Path, match: str, outtype: str = "f32", **options: Any) -> None:
    """The conversion fails with one line that says `match`, and leaves `out` as it was."""
    before = sorted(out.iterdir())
    with pytest.raises(ConvertError, match=match) as caught:
        convert(source, out / "model.gguf", outtype, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert sorted(out.iterdir()) == before


def edit_json(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; `text_config__x` is x in text_config, None removes a key."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def edit_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


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
    fails(source / "config.json", out, "no such folder")
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
    fails(source, out, "is in two shards|says nothing of tensor")


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
            "q_proj.weight is quantised, but its scale .* is missing",
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
    fails(source, out, "the model card cannot be read")
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


# ---- The target ---------------------------------------------------------------------------------


def test_existing_target(source: Path, out: Path) -> None:
    target = out / "model.gguf"
    target.write_text("precious")
    fails(source, out, "model.gguf: exists; --force replaces it")
    assert target.read_text() == "precious"
    convert(source, target, "f32", force=True, progress=False)
    assert target.read_bytes()[:4] == b"GGUF"


def test_existing_target_survives_a_failure(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = out / "model.gguf"
    target.write_text("precious")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, "f32", force=True, progress=False)
    assert (target.read_text(), list(out.iterdir())) == ("precious", [target])


def test_interrupt_while_threads_read_and_write(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, n_reads = encode.Slice.read, 0

    def interrupting(self: encode.Slice) -> encode.Bytes:
        nonlocal n_reads
        n_reads += 1
        if n_reads == 20:
            os.kill(os.getpid(), signal.SIGINT)  # arrives in the main thread,
            time.sleep(1)  # when that is given time on a busy machine
        return read(self)

    monkeypatch.setattr(encode.Slice, "read", interrupting)
    before = set(threading.enumerate())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            convert(source, out / "model.gguf", "f32", progress=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(out.iterdir()) == []
    # The progress bar has a thread of its own, which stays.
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if not thread.daemon]
    assert n_reads < 20 + 2 * encode.QUEUE


def test_targets_that_cannot_be_written(source: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no such folder to write to"):
        convert(source, out / "none" / "model.gguf", "f32", progress=False)
    loop = out / ".model.gguf.partial"
    loop.symlink_to(tmp_path / "elsewhere")
    fails(source, out, "writing failed")
    assert not (tmp_path / "elsewhere").exists()


def test_no_space_beforehand(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fails(source, out, r"no space left on the device: the file needs \d\.\d+ MB, 0\.00 MB are free")


def limited(n_bytes: int) -> Callable[[], None]:
    """Makes writing beyond `n_bytes` of a file fail, in a child process."""

    def apply() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return apply


def command(source: Path, target: Path, *options: str) -> list[str]:
    code = (
        "import argparse, sys\n"
        "from dgemma_convert import ConvertError, cli\n"
        "parser = argparse.ArgumentParser()\n"
        "cli.add_convert_parser(parser.add_subparsers())\n"
        "args = parser.parse_args()\n"
        "try: sys.exit(args.run(args))\n"
        "except ConvertError as error: sys.exit(f'error: {error}')\n"
    )
    words = ["convert", str(source), "--outtype", "f32", "--outfile", str(target), *options]
    return [sys.executable, "-c", code, *words]


def test_writing_fails_in_the_middle(source: Path, out: Path) -> None:
    """A limit on the size of files stands for a disk that fills up after the check."""
    for n_bytes in (1000, 60_000, 400_000):
        result = subprocess.run(
            command(source, out / "model.gguf"),
            preexec_fn=limited(n_bytes),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert "File too large" in result.stderr
        assert list(out.iterdir()) == []


def test_input_that_changes(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source / "model.safetensors"
    run = encode.run

    def touched(*args: Any) -> None:
        run(*args)
        os.utime(path, ns=(1, 1))

    def cut_short(*args: Any) -> None:
        os.truncate(path, path.stat().st_size // 2)
        run(*args)

    def replaced(*args: Any) -> None:
        run(*args)
        other = path.with_name("other")
        shutil.copy2(path, other)
        other.replace(path)

    content = path.read_bytes()
    for change, match in (
        (touched, "changed while it was being converted"),
        (replaced, "changed while it was being converted"),
        (cut_short, "cut short while being read"),
    ):
        path.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(encode, "run", change)
            fails(source, out, match)


def test_kill_at_any_moment(checkpoint: Callable[[str], Path], out: Path) -> None:
    """After SIGKILL there is no target, what lies there is no GGUF, and the next run clears it."""
    source, target = checkpoint("wide"), out / "model.gguf"
    hidden = out / ".model.gguf.partial"
    n_killed = 0
    for delay in np.linspace(0, 0.03, 6):
        process = subprocess.Popen(command(source, target), stdout=subprocess.DEVNULL)
        while not hidden.exists() and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        process.wait()
        if target.exists():  # it was faster
            gguf.GGUFReader(target)
            target.unlink()
            continue
        n_killed += 1
        assert [path.name for path in out.iterdir()] == [hidden.name]
        assert hidden.read_bytes()[:4] in (b"", bytes(4))
    assert n_killed > 0
    print(f"{n_killed} killed conversions")
    convert(source, target, "f32", progress=False)
    assert list(out.iterdir()) == [target]
    gguf.GGUFReader(target)


# Runs a conversion that kills itself with SIGKILL at the n-th call of a function of `os`.
KILLED = """
import os, signal, sys
from pathlib import Path
from dgemma_convert import convert
name, n, source, target = sys.argv[1], int(sys.argv[2]), *map(Path, sys.argv[3:5])
original, calls = getattr(os, name), 0
def counting(*args, **kwargs):
    global calls
    calls += 1
    if calls == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(os, name, counting)
convert(source, target, sys.argv[5], force=True, split_max_size=int(sys.argv[6]), progress=False)
print(calls)
"""


def state(folder: Path) -> dict[str, bytes]:
    """The content of all files that are not hidden; the hidden ones must not look whole."""
    for path in folder.glob(".*"):
        assert path.read_bytes()[:4] in (b"", bytes(4), b"GGUF"), path
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


@pytest.mark.parametrize("split_max_size", [0, 80_000])
@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace"])
def test_kill_at_every_step(
    checkpoint: Callable[[str], Path], out: Path, name: str, split_max_size: int
) -> None:
    """SIGKILL at calls from the first to the last: old or new files whole, and a clean next run."""
    source, target = checkpoint("small"), out / "model.gguf"
    arguments = [str(source), str(target), "q8_0", str(split_max_size)]

    def run(n: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", KILLED, name, str(n), *arguments]
        return subprocess.run(words, capture_output=True, text=True)

    n_calls = int(run(0).stdout)
    new = state(out)
    assert len(new) == 1 if split_max_size == 0 else len(new) > 2
    old = dict.fromkeys(new, b"GGUF, an older one")
    moments = sorted({1, 2, n_calls // 2, n_calls - 1, n_calls} & {*range(1, n_calls + 1)})
    for moment in moments:
        for path, content in old.items():
            (out / path).write_bytes(content)
        assert run(moment).returncode == -signal.SIGKILL
        found = state(out)
        # All are old or all are new, or the first shard is missing, so that nothing can be opened.
        assert found in (old, new) or (len(new) > 1 and min(new) not in found)
        assert all(content in (old[path], new[path]) for path, content in found.items())
    print(f"{len(moments)} kills at {n_calls} calls of os.{name}")
    convert(source, target, "q8_0", force=True, split_max_size=split_max_size, progress=False)
    assert state(out) == new
    assert sorted(path.name for path in out.iterdir()) == sorted(new)


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace", "ftruncate", "open"])
def test_every_call_may_fail(
    checkpoint: Callable[[str], Path], out: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call fails as on a full disk, for every n: the old file is all that is left."""
    source, target = checkpoint("small"), out / "model.gguf"
    original, calls, fails_at = getattr(os, name), 0, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, counting)
    convert(source, target, "q8_0", progress=False)
    new, n_calls = target.read_bytes(), calls
    # The last one is for the folder's entry, when the new file has its name already.
    is_after_rename = name in ("fsync", "open")
    for fails_at in range(1, n_calls + 1):
        calls = 0
        target.write_bytes(b"precious")
        with pytest.raises(ConvertError, match="no space left on the device"):
            convert(source, target, "q8_0", force=True, progress=False)
        renamed = is_after_rename and fails_at == n_calls
        assert target.read_bytes() == (new if renamed else b"precious")
        assert list(out.iterdir()) == [target]
    print(f"{n_calls} calls of os.{name}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_that_is_full(checkpoint: Callable[[str], Path], out: Path, tmp_path: Path) -> None:
    source, whole = checkpoint("small"), tmp_path / "whole.gguf"
    convert(source, whole, "f32", progress=False)
    size = whole.stat().st_size * 6 // 5
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        target = out / "model.gguf"
        convert(source, target, "q8_0", progress=False)
        old = target.read_bytes()
        fails(source, out, "no space left on the device", force=True)
        # Space that seems to be there when the conversion begins, and is gone in the middle.
        code = (
            "import shutil, sys\n"
            "from pathlib import Path\n"
            "from dgemma_convert import ConvertError, convert\n"
            "usage = shutil.disk_usage('/')._replace(free=1 << 40)\n"
            "shutil.disk_usage = lambda path: usage\n"
            "source, target = map(Path, sys.argv[1:])\n"
            "try: convert(source, target, 'f32', force=True, progress=False)\n"
            "except ConvertError as error: sys.exit(f'error: {error}')\n"
        )
        words = [sys.executable, "-c", code, str(source), str(target)]
        result = subprocess.run(words, capture_output=True, text=True)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert "no space left on the device" in result.stderr
        assert (target.read_bytes(), list(out.iterdir())) == (old, [target])
        target.unlink()
        convert(source, target, "f32", progress=False)
        assert target.read_bytes() == whole.read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a read-only file system")
def test_a_target_that_is_read_only(checkpoint: Callable[[str], Path], out: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(out)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a read-only file system")
    try:
        fails(checkpoint("small"), out, "Read-only file system")
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


def test_memory_is_bounded_by_a_slice(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A sparse embedding of 1 GiB is converted with far less memory than that."""
    source = Path(shutil.copytree(checkpoint("small"), tmp_path / "source"))
    n_rows = 4 << 20
    edit_json(source / "config.json", text_config__vocab_size=n_rows)
    tensors = load_file(source / "model.safetensors")
    name = "model.decoder.embed_tokens.weight"
    tensors[name] = torch.zeros(0, 64)
    save_file(tensors, source / "model.safetensors")
    raw = (source / "model.safetensors").read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n_header])
    end = len(raw) - 8 - n_header
    header[name].update(shape=[n_rows, 64], data_offsets=[end, end + n_rows * 256])
    changed = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(changed)) + changed + raw[8 + n_header :])
        file.truncate(8 + len(changed) + end + n_rows * 256)
    # The vocabulary of this size would itself take memory that has nothing to do with slices.
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from dgemma_convert import conversion, convert\n"
        "conversion.checkpoint_keys = lambda *a: {}\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'q8_0', progress=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "model.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) * 1024 < 400 << 20
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.tensors[0].n_bytes == n_rows * 68
