"""The application over an engine that is no model: all that another front end has to bring."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from dgemma.server import Settings, create_app
from dgemma.server.engine import Ask, Card, Event, Progress, QueueFullError
from dgemma.server.inprocess import HttpRequest

CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "parrot"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


class Opened:
    def __init__(self, ask: Ask) -> None:
        self.ask, self.cancelled, self.progress = ask, False, Progress()
        self.warnings = ask.options["warnings"]
        self.opening = [self.chunk({"role": "assistant"})] if ask.stream else []

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {**CHUNK, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    async def events(self) -> AsyncIterator[Event]:
        said = self.ask.options["messages"][-1]["content"]
        if self.ask.stream:
            yield Event("chunk", self.chunk({"content": said}))
            yield Event("chunk", self.chunk({}, "stop"))
        else:
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            whole = {**CHUNK, "object": "chat.completion", "choices": [choice], "usage": USAGE}
            yield Event("chunk", whole)
        yield Event("end", {"usage": USAGE, "stats": [{"seed": 1}]})

    def cancel(self) -> None:
        self.cancelled = True


class Parrot:
    """Says what it is told."""

    def __init__(self) -> None:
        self.opened: list[Opened] = []
        self.closed = self.full = False
        sizes = dict.fromkeys(
            ["context_length", "n_vocab", "n_embd", "n_parameters", "weight_bytes"], 1
        )
        self.card = Card("parrot", 64, 16, sampling={}, info=sizes)

    async def open(self, ask: Ask) -> Opened:
        if self.full:
            raise QueueFullError("the queue is full", retry_after=7)
        self.opened.append(Opened(ask))
        return self.opened[-1]

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    async def detokenize(self, tokens: Sequence[int]) -> list[bytes]:
        return [bytes([token]) for token in tokens]

    async def render(self, messages: Sequence[Any], **options: Any) -> str:
        return "".join(message["content"] for message in messages)

    def slots(self) -> list[dict[str, Any]]:
        return []

    def metrics(self) -> str:
        return "parrots 1\n"

    async def close(self) -> None:
        self.closed = True


def asked(engine: Parrot, *requests: tuple[str, str, Any]) -> list[httpx.Response]:
    async def work() -> list[httpx.Response]:
        app = create_app(engine, Settings())
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://parrot") as client:
            return [
                await client.request(method, path, json=body) for method, path, body in requests
            ]

    return asyncio.run(work())


BODY = {"messages": [{"role": "user", "content": "Hello"}]}


def test_every_route_works_over_another_engine() -> None:
    engine = Parrot()
    whole, streamed, models, tokens, text, prompt, metrics = asked(
        engine,
        ("POST", "/v1/chat/completions", BODY),
        ("POST", "/v1/chat/completions", {**BODY, "stream": True}),
        ("GET", "/v1/models", None),
        ("POST", "/tokenize", {"content": "ab", "with_pieces": True}),
        ("POST", "/detokenize", {"tokens": [97, 98]}),
        ("POST", "/apply-template", BODY),
        ("GET", "/metrics", None),
    )
    assert whole.json()["choices"][0]["message"]["content"] == "Hello"
    lines = streamed.text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-2]]
    assert deltas == [{"role": "assistant"}, {"content": "Hello"}, {}]
    assert models.json()["data"][0]["id"] == "parrot"
    assert tokens.json() == {"tokens": [{"id": 97, "piece": "a"}, {"id": 98, "piece": "b"}]}
    assert text.json() == {"content": "ab"}
    assert prompt.json() == {"prompt": "Hello"}
    assert metrics.text == "parrots 1\n"
    assert all(opened.cancelled for opened in engine.opened)


def test_what_was_ignored_is_named_in_a_header() -> None:
    (response,) = asked(Parrot(), ("POST", "/v1/chat/completions", {**BODY, "frobnicate": 0.5}))
    told = "frobnicate is not known here and was ignored"
    assert response.headers["x-dgemma-warnings"] == told


def test_a_full_queue_says_when_to_come_again() -> None:
    engine = Parrot()
    engine.full = True
    (response,) = asked(engine, ("POST", "/v1/chat/completions", BODY))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("kind", [TypeError, ValueError, AttributeError, OverflowError])
def test_a_bug_is_not_blamed_on_the_request(
    kind: type[Exception], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise kind("a secret of the inside")

    monkeypatch.setattr(Parrot, "render", broken)
    (response,) = asked(Parrot(), ("POST", "/apply-template", BODY))
    told = response.json()["error"]
    assert response.status_code == 500
    assert "secret" not in response.text
    assert told["id"] in told["message"]
    assert f"error {told['id']}: a secret of the inside" in caplog.text


def test_a_client_that_leaves_within_its_body_leaves_no_trace_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def left(body: bytes) -> list[Any]:
        app, sent = create_app(Parrot(), Settings()), []
        coming = [
            {"type": "http.request", "body": body, "more_body": True},
            {"type": "http.disconnect"},
        ]
        headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
        request = HttpRequest("POST", "/v1/chat/completions", b"", headers)

        async def receive() -> Any:
            return coming.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await app(request.scope(), receive, send)
        return sent

    for body in (b"", b'{"messages"'):
        assert asyncio.run(left(body))[0]["status"] == 400
    assert not caplog.records


def test_a_request_that_is_under_way_when_the_server_ends_is_told_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def for_ever(*_: object, **__: object) -> Any:
        await asyncio.Event().wait()

    async def ended() -> list[Any]:
        sent: list[Any] = []
        body = [{"type": "http.request", "body": b'{"content":"x"}', "more_body": False}]
        headers = [(b"content-type", b"application/json")]

        async def receive() -> Any:
            return body.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        app = create_app(Parrot(), Settings())
        scope = HttpRequest("POST", "/tokenize", b"", headers).scope()
        task = asyncio.create_task(app(scope, receive, send))
        while body:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        await task
        return sent

    monkeypatch.setattr(Parrot, "tokenize", for_ever)
    assert asyncio.run(ended())[0]["status"] == 503
    assert not caplog.records


@pytest.mark.parametrize("path", ["/apply-template", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("odd", ["x", 1, [1], True])
def test_fields_for_the_template_must_be_an_object(path: str, odd: object) -> None:
    (response,) = asked(Parrot(), ("POST", path, {**BODY, "chat_template_kwargs": odd}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "chat_template_kwargs"


def test_what_nobody_expected_is_logged_under_the_id_that_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise KeyError("a secret of the inside")

    monkeypatch.setattr(Parrot, "tokenize", broken)
    (response,) = asked(Parrot(), ("POST", "/tokenize", {"content": "x"}))
    assert response.status_code == 500
    error = response.json()["error"]
    assert "secret" not in error["message"]
    assert error["id"] in error["message"]
    (record,) = caplog.records
    assert error["id"] in record.getMessage()
    assert record.exc_info is not None
    assert "KeyError" in str(record.exc_info[0])
