"""The application without a socket: one request in, the messages of its answer out.

Batches and cluster replicas answer through the same routes as the server, so nothing that a route
checks, counts or words is written twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
AsgiApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[Message]],
        Callable[[Message], Awaitable[None]],
    ],
    Awaitable[None],
]

CANCEL_SECONDS = 30.0  # an application that was told that its client has gone ends within these


@dataclass(frozen=True)
class HttpRequest:
    """One request, whole. Header names are lower case, as ASGI has them."""

    method: str
    path: str
    body: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    query: bytes = b""
    client: tuple[str, int] | None = None

    def scope(self) -> MutableMapping[str, Any]:
        """The request as an ASGI application sees it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": self.client or ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
        }


async def exchange(app: AsgiApp, request: HttpRequest) -> AsyncIterator[Message]:
    """Answers one request: `http.response.start`, then one `http.response.body` after another.

    Ending the iteration early is a client that goes away: what it asked for is cancelled. What the
    application raises is raised here.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await messages.put(message)

    async def run() -> None:
        try:
            await app(request.scope(), receive, send)
        finally:
            await messages.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            yield message
        gone.set()
        await task
    finally:
        gone.set()
        if not task.done():
            with contextlib.suppress(asyncio.TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(task, CANCEL_SECONDS)


async def answer(app: AsgiApp, request: HttpRequest) -> tuple[int, bytes]:
    """The status and the whole body of an answer."""
    status, body = 500, bytearray()
    async for message in exchange(app, request):
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            body += message.get("body", b"")
    return status, bytes(body)
