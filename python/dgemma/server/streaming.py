"""Server-sent events: how they are written, and what keeps a silent stream alive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from starlette.responses import StreamingResponse

from .body import encode_json
from .engine import JsonObject, Progress

KEEP_ALIVE_SECONDS = 3.0  # of silence, after which a comment is sent
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def event(value: JsonObject, name: str | None = None) -> bytes:
    """One event; with a name, clients that know only unnamed ones pass it over."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encode_json(value) + b"\n\n"


def comment(progress: Progress) -> bytes:
    """A line that every client ignores, and a person who watches understands."""
    said = {
        "queued": f"waiting, {progress.ahead} before this one",
        "reading": "reading the prompt",
        "writing": "denoising",
    }
    return f": {said[progress.state]}\n\n".encode()


async def kept_alive(
    parts: AsyncIterator[bytes], sign: Callable[[], bytes]
) -> AsyncIterator[bytes]:
    """The parts as they come, and a sign of life whenever there has been none for a while."""
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(parts))
            done, _ = await asyncio.wait({waiting}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield sign()
                continue
            part, waiting = waiting, None
            try:
                yield part.result()
            except StopAsyncIteration:
                return
    finally:
        if waiting is not None:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await waiting
        close = getattr(parts, "aclose", None)
        if close is not None:
            await close()


def stream(
    parts: AsyncIterator[bytes], sign: Callable[[], bytes], headers: dict[str, str]
) -> StreamingResponse:
    """A response of events."""
    return StreamingResponse(
        kept_alive(parts, sign),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers},
    )
