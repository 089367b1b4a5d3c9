"""The HTTP server as a program on loopback: the API, its clients, and those that misbehave."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

KEY = "test-key"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SLOW = {"confidence_threshold": 1e-30, "max_denoising_steps": 10_000}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@contextlib.contextmanager
def running(path: Path, *options: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server and its address."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "import sys, dgemma.cli; sys.exit(dgemma.cli.main())"),
            *("serve", "-m", str(path), "--port", "0", "--alias", "tiny", "-c", "512"),
            *map(str, options),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        address = None
        while address is None:
            line = process.stderr.readline()
            assert line, f"the server ended with {process.poll()}"
            address = re.search(r"http://\S+", line)
        yield address[0], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.stderr.close()


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[str]:
    with running(tiny_gguf, "--api-key", KEY, "--max-queue", 2) as (address, _):
        yield address


@pytest.fixture
def http(server: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server, headers=headers, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server}/v1",
        api_key=KEY,
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=120),
    )


def ask(http: httpx.Client, **changes: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": QUESTION, "seed": 1, **changes})


def wait_until_idle(http: httpx.Client, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while "dgemma_requests_live 0\n" not in http.get("/metrics").text:
        assert time.monotonic() < deadline, "the server still works for a client that has gone"
        time.sleep(0.05)


# ---- The public client ---------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, seed=1)  # type: ignore[arg-type]
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 0
    stream = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,  # type: ignore[arg-type]
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="The old man", seed=1, max_tokens=8)
    stream = client.completions.create(
        model="tiny", prompt="The old man", seed=1, max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 8


def test_tools(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": QUESTION,
        "seed": 1,
        "max_tokens": 64,
        "tools": [WEATHER],
    }
    forced = {"type": "function", "function": {"name": "weather"}}
    whole = client.chat.completions.create(**options, tool_choice=forced)
    message = whole.choices[0].message
    assert "<|tool_call>" not in (message.content or "")
    for call in message.tool_calls or []:
        assert call.function.name == "weather"
        assert isinstance(json.loads(call.function.arguments), dict)
    plain = client.chat.completions.create(**options, tool_choice="none")
    assert plain.choices[0].message.tool_calls is None


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_errors_reach_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model="tiny", messages=QUESTION, top_p=0.5)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="context") as problem:
        client.completions.create(model="tiny", prompt="word " * 1000)
    assert problem.value.type == "exceed_context_size_error"


# ---- Other endpoints -----------------------------------------------------------------------------


def test_tokens_and_templates(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"content": "<|turn>hello 🦙"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {
        "content": "<|turn>hello 🦙"
    }
    prompt = http.post("/apply-template", json={"messages": QUESTION}).json()["prompt"]
    assert "<|turn>user\nWhat is the capital of France?<turn|>" in prompt
    props = http.get("/props").json()
    assert props["n_ctx"] == 512
    assert props["sampling"]["max_denoising_steps"] >= 1


def test_metrics_count(http: httpx.Client) -> None:
    def requests() -> int:
        found = re.search(r"^dgemma_requests_total (\d+)", http.get("/metrics").text, re.MULTILINE)
        assert found is not None
        return int(found[1])

    before = requests()
    assert ask(http, max_tokens=1).status_code == 200
    assert requests() == before + 1


def test_the_page_uses_nothing_from_outside(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page.text)


def test_drafts_are_asked_for(http: httpx.Client) -> None:
    plain = ask(http, stream=True).text
    assert "event:" not in plain
    events = ask(http, stream=True, drafts=True).text.split("\n\n")
    drafts = [e.split("data: ", 1)[1] for e in events if e.startswith("event: draft\n")]
    assert drafts
    for line in drafts:
        draft = json.loads(line)
        assert len(draft["tokens"]) == len(draft["pieces"]) == len(draft["entropies"])
    rest = [e for e in events if not e.startswith("event:")]
    assert [e.split(":")[0] for e in rest if e] == ["data"] * (len(rest) - 1)
    assert rest[-2] == "data: [DONE]"

    def content(lines: list[str]) -> str:
        chunks = [json.loads(e[6:]) for e in lines if e.startswith("data: {")]
        return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

    assert content(rest) == content(plain.split("\n\n"))


# ---- Who may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/models", "/props", "/metrics", "/nowhere"])
def test_the_key_protects_everything(server: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic !"}):
        response = httpx.get(server + path, headers=headers, trust_env=False)
        assert response.status_code == 401
    assert httpx.get(server + "/health", trust_env=False).json() == {"status": "ok"}


def test_a_browser_may_send_the_key_as_a_password(server: str) -> None:
    assert httpx.get(server, auth=("", KEY), trust_env=False).status_code == 200


def test_foreign_names_and_origins(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"Host": "attacker.example"}).status_code == 403
    response = http.get("/v1/models", headers={"Origin": "https://attacker.example"})
    assert "access-control-allow-origin" not in response.headers


# ---- Requests that are wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "JSON"),
        (b"{", 400, "JSON"),
        (b"\xff\xfe", 400, "UTF-8"),
        (b'{"messages": NaN}', 400, "NaN"),
        (b'{"messages": [], "seed": 1e999}', 400, "large"),
        (b"[" * 100_000, 400, "JSON|nested"),
        (b"{}", 400, "messages"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": "hi"}', 400, "messages"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', 400, "robot"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
        (b'{"messages": [{"role": "user", "content": "x"}], "frobnicate": 1}', 400, "frobnicate"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}', 400, "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e3}', 400, "seed"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 2}', 400, "n is not supported"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 0}', 400, "temperature"),
        (b'"' + b"x" * (9 * 2**20) + b'"', 413, "larger"),
    ],
    ids=range(17),
)
def test_bad_bodies(http: httpx.Client, body: bytes, status: int, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    assert re.search(message, response.json()["error"]["message"])
    assert ask(http, max_tokens=1).status_code == 200


def test_other_content_types_and_methods(http: httpx.Client) -> None:
    response = http.post(
        "/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 415
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/nowhere").json()["error"]["type"] == "invalid_request_error"


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


def test_half_a_request_holds_nobody_up(server: str, http: httpx.Client) -> None:
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
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


def test_a_port_in_use_is_one_line(tiny_gguf: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(AssertionError, match="ended"),
            running(tiny_gguf, "--port", taken.getsockname()[1]),
        ):
            pass
