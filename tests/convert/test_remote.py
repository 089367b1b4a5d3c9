"""`dgemma convert --remote`, against a small hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dgemma_convert import convert
from support.hub import REPOSITORY, Hub, serving


@pytest.fixture
def hub(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    """With the sharded checkpoint, and with what nobody needs."""
    folder = Path(shutil.copytree(checkpoint("wide"), tmp_path / "hub"))
    for name in ("consolidated.safetensors", "pytorch_model.bin", "picture.png", "training.json"):
        (folder / name).write_bytes(b"large")
    with serving(folder) as server:
        yield server


def run(address: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, with its cache in `tmp_path`; the hub's address is read when it starts."""
    program = "import sys; from dgemma.cli import main; sys.exit(main())"
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", program, "convert", "--remote", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )


def test_only_what_is_needed_is_fetched_and_only_once(hub: Hub, tmp_path: Path) -> None:
    result = run(hub.address, tmp_path, REPOSITORY, "--outtype", "q8_0", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["files"] == ["some-model-Q8_0.gguf"]
    shards = {file.name for file in hub.folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    index = "model.safetensors.index.json"
    assert sorted(hub.fetched) == sorted({*shards, *small, index, "chat_template.jinja"})
    convert(hub.folder, tmp_path / "local.gguf", "q8_0", model_name="some-model", progress=False)
    assert (tmp_path / "some-model-Q8_0.gguf").read_bytes() == (
        tmp_path / "local.gguf"
    ).read_bytes()

    hub.fetched.clear()
    again = run(hub.address, tmp_path, REPOSITORY, "--outtype", "q8_0", "--force")
    assert (again.returncode, hub.fetched) == (0, [])
    # Nobody listens there: the cache is enough.
    offline = run("http://127.0.0.1:9", tmp_path, REPOSITORY, "--outtype", "q8_0", "--force")
    assert offline.returncode == 0, offline.stderr


def test_what_cannot_be_had(hub: Hub, tmp_path: Path) -> None:
    result = run(hub.address, tmp_path, "no/such-model")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("dgemma: error: no/such-model: downloading failed: ")
    assert result.stderr.count("\n") == 1

    next(hub.folder.glob("model-*.safetensors")).unlink()
    result = run(hub.address, tmp_path, REPOSITORY)
    assert "which is missing" in result.stderr

    (hub.folder / "model.safetensors.index.json").unlink()
    shutil.rmtree(tmp_path / "cache")
    result = run(hub.address, tmp_path, REPOSITORY)
    assert "has neither model.safetensors nor model.safetensors.index.json" in result.stderr
    assert not list(tmp_path.glob("*.gguf"))
