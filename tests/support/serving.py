"""A server as a program on loopback, and how tests ask it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

KEY = "test-key"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# The same tests against a cluster's gateway: DGEMMA_TEST_SERVER=ray.
CLUSTER = ("--ray", "--replicas", "1") if os.environ.get("DGEMMA_TEST_SERVER") == "ray" else ()
own_connections = pytest.mark.skipif(
    bool(CLUSTER), reason="a cluster's connections are those of Ray's proxy"
)
keeping_responses = pytest.mark.skipif(bool(CLUSTER), reason="a cluster keeps no responses")
SLOW = {"confidence_threshold": 1e-30, "max_denoising_steps": 10_000}


@contextlib.contextmanager
def running(
    path: Path, *options: object, before: str = ""
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server and its address; `before` is Python that runs first, to shorten its patience.

    What it wrote to standard error is the process's `said` in the end.
    """
    if before and CLUSTER:
        pytest.skip("what is planted in the server's process does not reach a cluster's replicas")
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                "-c",
                f"{before}\nimport sys, dgemma.cli; sys.exit(dgemma.cli.main())",
            ),
            *("serve", "-m", str(path), "--port", "0", "--alias", "tiny", "-c", "512"),
            *CLUSTER,
            *map(str, options),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        address, said = None, ""
        while address is None:
            line = process.stderr.readline()
            assert line, f"the server ended with {process.wait(60)}: {said}"
            said += line
            address = re.search(r"dgemma: (http://\S+)", line)
        yield address[1], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.said = said + process.communicate(timeout=60)[1]  # type: ignore[attr-defined]
        finally:
            process.kill()
            process.stderr.close()


def ask(http: httpx.Client, **changes: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": QUESTION, "seed": 1, **changes})


def counted(http: httpx.Client, name: str) -> int:
    found = re.search(rf"^dgemma_{name}_total (\d+)", http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def wait_until_idle(http: httpx.Client, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while "dgemma_requests_live 0\n" not in http.get("/metrics").text:
        assert time.monotonic() < deadline, "the server still works for a client that has gone"
        time.sleep(0.05)
