"""The cluster's gateway: takes HTTP requests, finds a replica for each, and passes its answer on.

It has no routes of its own but `/metrics`, which adds the replicas' up: every endpoint, its checks
and its errors are those of the server's application, which each replica runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from ..server.inprocess import HttpRequest
from .prefixes import STATE
from .relayed import EventLog, Head, RelayedRequest

MAX_BODY = 8 * 2**20 + 1  # one more than the server takes: it says so itself
ATTEMPTS = 5
LOST = (RayActorError, DeploymentUnavailableError, RayServeException)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gateway:
    """An ASGI application in front of a deployment of replicas.

    `ask` starts a request's way to a replica and returns its answer: a `Head`, then bytes.
    `seeded` says whether streamed answers without a seed get one (see `EventLog`).
    """

    def __init__(self, ask: Callable[[RelayedRequest], Any], *, seeded: bool) -> None:
        self._ask, self._seeded = ask, seeded
        self._repeated = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        http = HttpRequest(
            scope["method"],
            scope["path"],
            await _body(receive),
            [(bytes(name), bytes(value)) for name, value in scope["headers"]],
            scope["query_string"],
            tuple(scope["client"]) if scope.get("client") else None,
        )
        work = asyncio.create_task(self._answer(http, send))
        gone = asyncio.create_task(_wait_until_gone(receive))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():  # the client has gone
            work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    async def _answer(self, http: HttpRequest, send: Send) -> None:
        # Off the event loop: what has megabytes must not hold the others up.
        asked = await asyncio.get_running_loop().run_in_executor(
            None, functools.partial(RelayedRequest.of, http, seeded=self._seeded)
        )
        if http.path == "/metrics":
            await self._metrics(asked, send)
            return
        passed, log = _Passed(send), EventLog()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._pass_on(asked, passed, log)
                return
            except LOST:
                if attempt == ATTEMPTS:
                    raise
                self._repeated += 1
                log.restart()
                await asyncio.sleep(0.2 * attempt)

    async def _pass_on(self, asked: RelayedRequest, passed: _Passed, log: EventLog) -> None:
        """One attempt. A stream is passed on as it comes, anything else once it is whole."""
        head, body, streams = Head(503, []), bytearray(), False
        async for item in self._items(asked):
            if isinstance(item, Head):
                head, streams = item, _is_stream(item)
            elif not streams:
                body += item
            elif data := log.feed(item):
                await passed.start(head)
                await passed.part(data)
        await passed.start(head)
        await passed.part(log.flush() if streams else bytes(body), last=True)

    async def _items(self, asked: RelayedRequest) -> AsyncIterator[Head | bytes]:
        response = self._ask(asked)
        try:
            async for item in response:
                yield item
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def _metrics(self, asked: RelayedRequest, send: Send) -> None:
        """The replicas' counters one by one and added up, and the gateway's own."""
        head, text = await self._whole(asked)
        texts: dict[str, str] = {}
        if head.status == 200:
            for name in sorted(STATE.replicas):
                with contextlib.suppress(*LOST):  # one that has just gone
                    _, texts[name] = await self._whole(replace(asked, replica=name))
            text = merged(texts) + self._own()
        headers = [(n, v) for n, v in head.headers if n != b"content-length"]
        passed = _Passed(send)
        await passed.start(Head(head.status, headers))
        await passed.part(text.encode(), last=True)

    async def _whole(self, asked: RelayedRequest) -> tuple[Head, str]:
        head, data = Head(503, []), b""
        async for item in self._items(asked):
            if isinstance(item, Head):
                head = item
            else:
                data += item
        return head, data.decode()

    def _own(self) -> str:
        lines = []
        for name, kind, help, value in (
            ("replicas", "gauge", "Replicas that answer.", len(STATE.replicas)),
            ("routed_total", "counter", "Requests that have a conversation.", STATE.routed),
            ("prefix_hits_total", "counter", "Sent to their prefix's replica.", STATE.hits),
            ("repeated_total", "counter", "Attempts after a lost replica.", self._repeated),
        ):
            full = f"dgemma_{name}"
            lines += [f"# HELP {full} {help}", f"# TYPE {full} {kind}", f"{full} {value}"]
        return "\n".join(lines) + "\n"


_SAMPLE = re.compile(r"^(dgemma_)(\w+)(\{.*\})? (\S+)$")


def merged(texts: dict[str, str]) -> str:
    """Prometheus texts of several replicas as one.

    Sums stand under the plain server's names, each replica's own under `dgemma_replica_…`.
    """
    comments: dict[str, str] = {}
    sums: dict[str, float] = defaultdict(float)
    own: list[str] = []
    for replica, text in texts.items():
        for line in text.splitlines():
            if line.startswith("#"):
                comments.setdefault(" ".join(line.split()[1:3]), line)
                continue
            found = _SAMPLE.match(line)
            if found is None:
                continue
            prefix, name, labels, value = found.groups()
            sums[f"{prefix}{name}{labels or ''}"] += float(value)
            inner = (labels or "{}")[1:-1]
            label = ",".join(filter(None, [inner, f'replica="{replica}"']))
            own.append(f"{prefix}replica_{name}{{{label}}} {value}")
    lines = list(comments.values())
    lines += [f"{name} {value:.17g}" for name, value in sums.items()]
    return "\n".join([*lines, *own, ""])


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    while len(body) < MAX_BODY:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            break
    return bytes(body[:MAX_BODY])


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Passed:
    """What the client has been sent of its answer."""

    def __init__(self, send: Send) -> None:
        self._send, self._started = send, False

    async def start(self, head: Head) -> None:
        """Status and headers; those of the first attempt stand."""
        if not self._started:
            self._started = True
            # Ray's proxy adds the same id once more.
            headers = [(n, v) for n, v in head.headers if n.lower() != b"x-request-id"]
            message = {"status": head.status, "headers": headers}
            await self._send({"type": "http.response.start", **message})

    async def part(self, data: bytes, *, last: bool = False) -> None:
        """More of the body, or the rest of it."""
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})


def _is_stream(head: Head) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in head.headers
    )
