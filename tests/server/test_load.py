"""The server under load, and clients that vanish, stall, or never finish what they began."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.serving import (
    KEY,
    QUESTION,
    SLOW,
    ask,
    counted,
    own_connections,
    running,
    wait_until_idle,
)

# ---- Load, and clients that go away --------------------------------------------------------------


def test_a_full_queue_says_so(http: httpx.Client, server: str) -> None:
    wait_until_idle(http)
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # one at work, two in the queue
            response = stack.enter_context(
                http.stream(
                    "POST",
                    "/v1/chat/completions",
                    json={"messages": QUESTION, "stream": True, **SLOW},
                )
            )
            assert response.status_code == 200
        refused = ask(http)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
    wait_until_idle(http)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_model(
    server: str, http: httpx.Client, stream: bool
) -> None:
    wait_until_idle(http)
    host, port = server.removeprefix("http://").split(":")
    body = json.dumps({"messages": QUESTION, "stream": stream, **SLOW}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 60
        while "dgemma_requests_live 1\n" not in http.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    wait_until_idle(http)
    assert ask(http, max_tokens=1).status_code == 200


IMPATIENT = (
    "from dgemma.server import body, connection\n"
    "body.BODY_SECONDS = connection.HEAD_SECONDS = connection.STALLED_SECONDS = 0.5\n"
)
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    "Content-Length: {}\r\n\r\n"
)


@pytest.fixture(scope="module")
def impatient(tiny_gguf: Path) -> Iterator[str]:
    """A server that soon gives up on those who hold it up."""
    with running(tiny_gguf, before=IMPATIENT) as (address, _):
        yield address


def connected(address: str, receive_bytes: int | None = None) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(60)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((host, int(port)))
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """What the server still says before it ends the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            found += data
    return found


@own_connections
@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le", b""),
        (HEAD.format(100).encode() + b'{"mess', b"HTTP/1.1 408 "),
        (b"\x16\x03\x01nonsense\r\n\r\n", b"HTTP/1.1 400 "),
    ],
    ids=["nothing", "half a head", "half a body", "no HTTP"],
)
def test_half_a_request_is_given_up(impatient: str, sent: bytes, answered: bytes) -> None:
    with connected(impatient) as connection:
        connection.sendall(sent)
        answer = httpx.post(
            f"{impatient}/v1/chat/completions",
            json={"messages": QUESTION, "max_tokens": 1},
            trust_env=False,
            timeout=60,
        )
        assert answer.status_code == 200  # it holds nobody up
        if sent.startswith(b"POST") and answered:
            assert connection.recv(13) == answered
        else:  # and the server ends the connection
            assert rest_of(connection).startswith(answered)


@own_connections
def test_half_of_a_second_request_is_given_up(impatient: str) -> None:
    with connected(impatient) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += connection.recv(65536)
        connection.sendall(b"GET /hea")
        assert rest_of(connection) == b""


@own_connections
def test_a_reader_that_stops_reading_is_dropped(impatient: str) -> None:
    body = json.dumps({"messages": QUESTION, "stream": True, "drafts": True, **SLOW}).encode()
    with connected(impatient, receive_bytes=4096) as stalled:
        stalled.sendall(HEAD.format(len(body)).encode() + body)
        assert stalled.recv(1024)
        # Nothing is read from here on: the buffers fill up, and the answer ends with the
        # connection, in the middle of its first canvas.
        with httpx.Client(base_url=impatient, trust_env=False, timeout=60) as http:
            before = counted(http, "canvases")
            wait_until_idle(http)
            assert counted(http, "canvases") == before
            assert ask(http, max_tokens=1).status_code == 200


def test_a_slow_reader_gets_the_whole_answer(impatient: str) -> None:
    body = json.dumps({"messages": QUESTION, "stream": True, "seed": 1}).encode()
    with connected(impatient, receive_bytes=4096) as slow:
        slow.sendall(HEAD.format(len(body)).encode() + body)
        found = b""
        while b"[DONE]" not in found:
            data = slow.recv(64)
            assert data
            found += data
            time.sleep(0.01)
    assert b"Paris" in b"".join(re.findall(rb'"content":"([^"]*)"', found))


def test_a_client_that_goes_away_between_canvases(http: httpx.Client) -> None:
    wait_until_idle(http)
    stops = {"messages": [{"role": "user", "content": "Count from 7 to 40."}], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json={**stops, "seed": 1, **SLOW}) as response:
        assert response.status_code == 200
    wait_until_idle(http)
    # The first text comes with the first canvas: who leaves then, leaves between two of them.
    with http.stream(
        "POST", "/v1/chat/completions", json={**stops, "max_tokens": 400, "seed": 1}
    ) as response:
        for line in response.iter_lines():
            if '"content"' in line:
                break
    wait_until_idle(http)
    assert ask(http, max_tokens=1).status_code == 200


def test_many_clients_at_once(server: str, http: httpx.Client) -> None:
    wait_until_idle(http)
    expected = ask(http, max_tokens=4).json()["choices"][0]["message"]["content"]
    found: list[int] = []
    texts: set[str] = set()

    def work() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server, headers=headers, timeout=120, trust_env=False) as own:
            response = ask(own, max_tokens=4)
            found.append(response.status_code)
            if response.status_code == 200:
                texts.add(response.json()["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=work) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 64
    assert set(found) <= {200, 503}
    assert found.count(200) >= 3
    assert texts == {expected}
    wait_until_idle(http)


def test_sigterm_while_generating(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as (address, process):
        body = {"messages": QUESTION, "stream": True, **SLOW}
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=body, timeout=60, trust_env=False
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.HTTPError):
                list(lines)
        assert process.wait(60) == 0


def test_an_answer_under_way_may_finish_after_sigterm(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as (address, process):
        body = {"messages": QUESTION, "stream": True, "max_denoising_steps": 100,
                "confidence_threshold": 1e-30, "seed": 1}  # fmt: skip
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=body, timeout=60, trust_env=False
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)
        assert process.wait(60) == 0


@own_connections
def test_memory_after_many_requests(tiny_gguf: Path) -> None:
    """After hundreds of requests of every kind, good, bad and abandoned, nothing has piled up."""
    with running(tiny_gguf) as (address, process):

        def rss() -> int:
            return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096

        def some(http: httpx.Client, n: int) -> None:
            for i in range(n):
                assert ask(http, max_tokens=4, stream=bool(i % 2)).status_code == 200
                assert http.post("/v1/chat/completions", json={}).status_code == 400
                body = {"messages": QUESTION, "stream": True, "drafts": True, **SLOW}
                with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    next(response.iter_lines())
                with connected(address) as half:
                    half.sendall(b"POST /v1")

        with httpx.Client(base_url=address, trust_env=False, timeout=60) as http:
            some(http, 30)
            wait_until_idle(http)
            before = rss()
            some(http, 150)
            wait_until_idle(http)
            assert rss() < before + 8 * 2**20
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
            assert files < 64


def test_a_port_in_use_is_one_line(tiny_gguf: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(AssertionError, match=r"cannot listen on 127\.0\.0\.1:") as ended,
            running(tiny_gguf, "--port", taken.getsockname()[1]),
        ):
            pass
        assert "ended with 1" in str(ended.value)
