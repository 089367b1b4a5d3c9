"""Faults while a file is written: one clear line, and nothing lost or left behind."""

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
from support.conversions import edit_json, fails


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


def test_no_space_beforehand(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fails(source, out, r"no space left on the device: the file needs \d[.\d]+ MB, 1 kB are free")


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
    n_killed = 0
    for delay in np.linspace(0, 0.03, 6):
        process = subprocess.Popen(command(source, target), stdout=subprocess.DEVNULL)
        left = set(out.iterdir())
        while not set(out.iterdir()) - left and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        process.wait()
        if target.exists():  # it was faster
            gguf.GGUFReader(target)
            target.unlink()
            continue
        n_killed += 1
        (hidden,) = out.iterdir()  # earlier ones have been removed
        assert hidden.name.startswith(".model.gguf.")
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
        "from dgemma_convert import conversion, convert, production\n"
        "conversion.checkpoint_keys = lambda *a: {}\n"
        "production.check_file = lambda path: None\n"
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
