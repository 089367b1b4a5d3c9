"""`dgemma run` and `-hf`: from the name of a repository to answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma.cli import obtain
from dgemma.errors import Error
from support.hub import REPOSITORY, Hub, serving

PROGRAM = [sys.executable, "-c", "import sys, dgemma.cli; sys.exit(dgemma.cli.main())"]
QUESTION = "What is the capital of France?"


def run(
    hub: Hub, cache: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        input=f"{QUESTION}\n",
        capture_output=True,
        text=True,
        env=hub.environment(cache, **environment),
    )


def test_a_gguf_file_is_downloaded_and_talked_with(tiny_gguf: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "files", tmp_path / "cache"
    folder.mkdir()
    shutil.copy(tiny_gguf, folder / "tiny-Q8_0.gguf")
    (folder / "tiny-Q2_K.gguf").write_bytes(b"not asked for")
    with serving(folder) as hub:
        hub.cut_at = 100_000  # the line breaks once
        name = f"{REPOSITORY}:Q8_0"
        done = run(hub, cache, "run", name, "--seed", 1, "-c", 512)
        if done.returncode != 0:
            done = run(hub, cache, "run", name, "--seed", 1, "-c", 512)
        assert done.returncode == 0, done.stderr
        assert hub.n_cut == 1
        assert "Paris" in done.stdout
        hub.fetched.clear()
        done = run(hub, cache, "generate", "-hf", name, "-p", "x", "-n", 2, HF_HUB_OFFLINE="1")
        assert (done.returncode, done.stderr) == (0, "")
        assert hub.fetched == []
        done = run(hub, cache, "run", REPOSITORY)
        assert done.returncode == 1
        assert "several files in GGUF: name one of tiny-Q2_K.gguf, tiny-Q8_0.gguf" in done.stderr


def test_a_checkpoint_is_converted_once(tiny: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "files", tmp_path / "cache"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.py", "*.jsonl", "__pycache__"))
    with serving(folder) as hub:
        name = f"{REPOSITORY}:Q8_0"
        done = run(hub, cache, "run", name, "--seed", 1, "-c", 512)
        assert done.returncode == 0, done.stderr
        assert "then it is converted" in done.stderr
        assert "Paris" in done.stdout
        (made,) = (cache / "dgemma").rglob("*.gguf")
        assert made.name.endswith("-q8_0.gguf")
        again = run(hub, cache, "run", name, "--seed", 1, "-c", 512, HF_HUB_OFFLINE="1")
        assert (again.returncode, again.stderr) == (0, "")
        assert "Paris" in again.stdout


def test_disk_and_memory_are_looked_at_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Error, match=r"900000\.00 GB are to be downloaded to .*not-yet"):
        obtain._check_disk(tmp_path / "not-yet", 9 * 10**14)
    obtain._check_disk(tmp_path, 0)
    obtain._check_memory(9 * 10**14)
    assert "every step will read the disk" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "a/b c", "", ":Q4_0"])
def test_names_of_repositories(name: str) -> None:
    with pytest.raises(ValueError, match="USER/REPO"):
        obtain.split_name(name)
