"""`dgemma convert --remote`, against a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dgemma_convert import convert

REPOSITORY, COMMIT = "someone/some-model", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as a repository; counts the files that were fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            files = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in self.files().items()
            ]
            self.answer(json.dumps(files).encode(), "application/json")
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            info = {
                "id": REPOSITORY,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in self.files()],
            }
            self.answer(json.dumps(info).encode(), "application/json")
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[1]
            if self.command == "GET":
                self.server.fetched.append(name)
            self.answer((self.server.folder / name).read_bytes(), "application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def files(self) -> dict[str, Path]:
        return {file.name: file for file in sorted(self.server.folder.iterdir())}

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    """With the sharded checkpoint, and with what nobody needs."""
    folder = Path(shutil.copytree(checkpoint("wide"), tmp_path / "hub"))
    for name in ("consolidated.safetensors", "pytorch_model.bin", "picture.png", "training.json"):
        (folder / name).write_bytes(b"large")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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
