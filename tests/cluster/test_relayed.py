"""Requests on their way to a replica, and answers that a second replica goes on with."""

from __future__ import annotations

import json

import pytest

from dgemma.ray.relayed import EventLog, RelayedRequest
from dgemma.server.body import parse_json
from dgemma.server.inprocess import HttpRequest


def event(text: str, id: str = "first", created: int = 1) -> bytes:
    return b"data: " + json.dumps({"id": id, "created": created, "text": text}).encode() + b"\n\n"


def posted(path: str, **body: object) -> RelayedRequest:
    http = HttpRequest("POST", path, json.dumps(body).encode())
    return RelayedRequest.of(http, seeded=True)


@pytest.mark.parametrize("given", [{}, {"seed": None}, {"seed": -1}])
def test_streams_without_a_seed_get_one(given: dict[str, object]) -> None:
    asked = posted("/v1/chat/completions", stream=True, **given)
    assert 0 <= json.loads(asked.http.body)["seed"] < 2**31


@pytest.mark.parametrize("body", [b' { "stream" : true } \n', b'{"stream":true,"seed":null}'])
def test_the_seed_stands_behind_what_was_sent(body: bytes) -> None:
    http = HttpRequest("POST", "/v1/completions", body)
    made = RelayedRequest.of(http, seeded=True).http.body
    assert made.startswith(body.rstrip()[:-1])
    assert isinstance(parse_json(made)["seed"], int)


def test_what_the_server_refuses_goes_on_as_it_is() -> None:
    for body in (
        b'{"stream":true,"messages":[' + b"1," * 400_000 + b"1]}",
        b'{"stream":true,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"stream":true,"temperature":NaN}',
        b'\xff{"stream":true}',
    ):
        http = HttpRequest("POST", "/v1/chat/completions", body)
        asked = RelayedRequest.of(http, seeded=True)
        assert asked.http is http
        assert asked.keys == []


def test_nothing_else_is_changed() -> None:
    for path, body in (
        ("/v1/chat/completions", {"stream": True, "seed": 7}),
        ("/v1/chat/completions", {"stream": False}),
        ("/v1/messages", {"stream": True}),
    ):
        assert json.loads(posted(path, **body).http.body) == body
    broken = HttpRequest("POST", "/v1/chat/completions", b'{"stream": true')
    assert RelayedRequest.of(broken, seeded=True).http is broken
    fixed = HttpRequest("POST", "/v1/completions", b'{"stream": true}')
    assert RelayedRequest.of(fixed, seeded=False).http is fixed


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_stream_passes_as_it_is(size: int) -> None:
    whole = b": waiting\n\n" + event("a") + event("b") + b"data: [DONE]\n\n"
    log = EventLog()
    parts = [log.feed(whole[i : i + size]) for i in range(0, len(whole), size)]
    assert b"".join(parts) + log.flush() == whole


@pytest.mark.parametrize("cut", [5, len(event("a")), len(event("a")) + 4])
def test_a_second_attempt_goes_on_behind_what_was_sent(cut: int) -> None:
    first = event("a") + event("b")
    second = event("a", "second", 2) + event("b", "second", 2) + b"data: [DONE]\n\n"
    log = EventLog()
    got = log.feed(first[:cut])
    log.restart()
    got += log.feed(second) + log.flush()
    blocks = got.split(b"\n\n")
    assert blocks.pop() == b""
    assert blocks.pop() == b"data: [DONE]"
    events = [json.loads(block[6:]) for block in blocks]
    assert [e["text"] for e in events] == ["a", "b"]
    wanted = ("first", 1) if cut >= len(event("a")) else ("second", 2)
    assert {(e["id"], e["created"]) for e in events} == {wanted}


def test_comments_and_drafts_are_not_counted() -> None:
    draft = b'event: draft\ndata: {"step": 1}\n\n'
    log = EventLog()
    assert log.feed(b": waiting\n\n" + draft + event("a")).endswith(event("a"))
    log.restart()
    assert log.feed(draft + event("a", "second")) == draft
    assert log.feed(b": still here\n\n") == b": still here\n\n"
