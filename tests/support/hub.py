"""A small Hugging Face hub on this machine: one repository, served from a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY, COMMIT = "someone/some-model", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as a repository; counts the files that were fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched: list[str] = []
        self.cut_at: int | None = None  # bytes after which the next file breaks off
        self.n_cut = 0  # files that did
        self.hold_at: int | None = None  # bytes after which the next file pauses, until `go_on`
        self.go_on = threading.Event()
        self.ranges: list[int] = []  # first bytes that were asked for, of files

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, cache: Path, **changes: str) -> dict[str, str]:
        """For a program whose hub this is, with its cache in a folder of its own."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "DGEMMA_CACHE": str(cache / "dgemma"),
            "NO_PROXY": "127.0.0.1",
            **changes,
        }


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
            siblings = [
                {"rfilename": name, "size": file.stat().st_size}
                for name, file in self.files().items()
            ]
            info = {"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [],
                    "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
            self.answer(json.dumps(info).encode(), "application/json")
        elif path.startswith(tuple(f"/{REPOSITORY}/resolve/{r}/" for r in (COMMIT, "main"))):
            name = path.split("/", 5)[5]
            if self.command == "GET":
                self.server.fetched.append(name)
            self.answer((self.server.folder / name).read_bytes(), "application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def files(self) -> dict[str, Path]:
        folder = self.server.folder
        return {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*"))}

    def answer(self, body: bytes, kind: str) -> None:
        whole, first = body, 0
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and self.command == "GET":
            first = int(asked.removeprefix("bytes=").split("-")[0])
            body = body[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.end_headers()
        if self.command == "GET" and kind != "application/json":
            self.server.ranges.append(first)
            hold, self.server.hold_at = self.server.hold_at, None
            if hold is not None:
                self.wfile.write(body[:hold])
                self.wfile.flush()
                self.server.go_on.wait(60)
                self.close_connection = True
                return
        if self.command == "GET":
            cut = self.server.cut_at
            if cut is None or kind == "application/json" or first:
                self.wfile.write(body)
            else:
                self.server.cut_at = None
                self.server.n_cut += 1
                self.wfile.write(body[:cut])
                self.close_connection = True


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub with the files of a folder."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
