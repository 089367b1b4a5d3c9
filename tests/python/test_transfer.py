"""Downloads into the hub's cache that are interrupted, damaged, or made twice at a time."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.hub import REPOSITORY, Hub, serving

NAME = "model-Q4_0.gguf"
PROGRAM = "import sys; from dgemma import hub; print(hub.download(sys.argv[1]))"
SIZE = 25_000_000  # the hub's library writes in pieces of 10 MiB
CONVERT = [sys.executable, "-c", "import sys, dgemma.cli; sys.exit(dgemma.cli.main())", "run"]


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / NAME).write_bytes(np.random.default_rng(0).bytes(SIZE))
    with serving(folder) as hub:
        yield hub
        hub.go_on.set()


def start(hub: Hub, cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, REPOSITORY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=hub.environment(cache, **environment),
    )


def partial_of(cache: Path) -> Path:
    (found,) = cache.rglob("*.continues")
    return found


def wait_for(size: int, cache: Path) -> None:
    for _ in range(600):
        if any(path.stat().st_size >= size for path in cache.rglob("*.continues")):
            return
        time.sleep(0.1)
    raise AssertionError("the download has not come so far")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_download_continues(large: Hub, tmp_path: Path, how: signal.Signals) -> None:
    cache = tmp_path / "cache"
    large.hold_at = 22_000_000
    first = start(large, cache)
    wait_for(20 << 20, cache)
    first.send_signal(how)
    first.communicate(timeout=60)
    large.go_on.set()
    assert first.returncode != 0
    present = partial_of(cache).stat().st_size
    assert present == 20 << 20
    said, problems = start(large, cache).communicate(timeout=60)
    assert large.ranges == [0, present], problems
    path = Path(said.strip())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.resolve().name
    assert path.read_bytes() == (large.folder / NAME).read_bytes()
    assert not list(cache.rglob("*.continues"))
    # It is the library's own cache: nothing is fetched again, and nothing needs the network.
    said, problems = start(large, cache, HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert Path(said.strip()) == path, problems
    assert len(large.ranges) == 2


def test_a_damaged_download_is_taken_away(large: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digest = hashlib.sha256((large.folder / NAME).read_bytes()).hexdigest()
    blobs = cache / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest}.continues").write_bytes(bytes(1000))  # what should be the file's beginning
    first = start(large, cache)
    _, problems = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "came damaged: its SHA-256 is not what the hub says" in problems
    assert large.ranges == [1000]
    assert not list(blobs.iterdir())
    second = start(large, cache)
    _, problems = second.communicate(timeout=60)
    assert second.returncode == 0, problems


def test_two_programs_fetch_a_file_once(large: Hub, tmp_path: Path) -> None:
    both = [start(large, tmp_path / "cache") for _ in range(2)]
    paths = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert large.ranges == [0]


def test_a_conversion_that_was_killed_begins_again(tiny: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "files", tmp_path / "cache"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.py", "*.jsonl", "__pycache__"))
    with serving(folder) as hub:
        command = [*CONVERT, f"{REPOSITORY}:Q8_0", "-c", "512", "--seed", "1"]
        made = cache / "dgemma" / REPOSITORY.replace("/", "--")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=hub.environment(cache),
        )
        while process.poll() is None and not (made.is_dir() and any(made.iterdir())):
            time.sleep(0.005)
        process.kill()
        process.communicate()
        fetched = len(hub.fetched)
        done = subprocess.run(
            command,
            input="What is the capital of France?\n",
            capture_output=True,
            text=True,
            env=hub.environment(cache),
        )
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
        assert [path.suffix for path in made.iterdir()] == [".gguf"]
        assert [name for name in hub.fetched[fetched:] if name.endswith(".safetensors")] == []
