"""What the routes share: reading requests, asking the engine, and saying what went wrong."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ..errors import CancelledError
from .body import encode_json, read_json
from .engine import Ask, Engine, Event, JsonObject, Opened, Settings
from .failures import Failure, failure
from .schemas import Body, checked
from .store import ResponseStore

R = TypeVar("R", bound=Body)
Handler: TypeAlias = Callable[["Front", Request], Awaitable[Any]]
ErrorForm: TypeAlias = Callable[[Failure], JsonObject]
MAX_HEADER = 2000  # characters of warnings in a header


class Json(JSONResponse):
    """A JSON answer."""

    def render(self, content: Any) -> bytes:
        """Its bytes."""
        return encode_json(content)


@dataclass
class Front:
    """The application's engine and settings, as every route gets them."""

    engine: Engine
    settings: Settings
    page: str = ""
    paths: dict[str, set[str]] = field(default_factory=dict)  # methods of each path
    created: int = field(default_factory=lambda: int(time.time()))
    parsing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "dgemma-parse")
    )

    def __post_init__(self) -> None:
        self.kept = ResponseStore(self.settings.kept_bytes)

    async def read(self, request: Request, kind: type[R]) -> R:
        """The request in a body."""
        value = await read_json(request, self.settings.max_body, self.parsing)
        return checked(value, kind)

    async def whole(self, request: Request, ask: Ask) -> tuple[Opened, Event, Event]:
        """An answer in one piece and its figures; ends it where the client goes away."""
        opened = await self.engine.open(ask)
        gone = asyncio.create_task(_wait_until_gone(request, opened))
        found: list[Event] = []
        try:
            async for event in opened.events():
                found.append(event)
        finally:
            gone.cancel()
            opened.cancel()
        if len(found) < 2:
            raise CancelledError("the answer was cancelled")
        return opened, found[0], found[-1]


async def _wait_until_gone(request: Request, opened: Opened) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    opened.cancel()


def client_of(request: Request, user: object = None) -> str:
    """Who asks, so that the queue is fair: address, key, and the name that the request gives."""
    host = request.client.host if request.client else "?"
    key = request.headers.get("authorization") or request.headers.get("x-api-key") or ""
    named = "".join(filter(str.isprintable, user)) if isinstance(user, str) else ""
    return f"{host}{f' {hash(key) & 0xFFFF:04x}' if key else ''}{f' {named[:64]}' if named else ''}"


def warned(warnings: Sequence[str]) -> dict[str, str]:
    """The header that names what was ignored."""
    if not warnings:
        return {}
    text = "; ".join(warnings)[:MAX_HEADER].encode("ascii", "replace").decode()
    shown = "".join(c if c.isprintable() else "?" for c in text)[:MAX_HEADER]
    return {"X-Dgemma-Warnings": shown.strip()}  # HTTP has no values that begin or end with a space


def openai_form(told: Failure) -> JsonObject:
    """An error as OpenAI's clients read it."""
    return told.body


def refused(problem: BaseException, form: ErrorForm = openai_form) -> Response:
    """The answer to a request that failed."""
    told = failure(problem)
    return Json(form(told), told.status, headers=told.headers)


def route(
    router: APIRouter,
    method: str,
    *paths: str,
    body: type[Body] | None = None,
    form: ErrorForm = openai_form,
) -> Callable[[Handler], Handler]:
    """Registers a handler under several paths; the first one is shown in /openapi.json."""

    def register(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def guarded(request: Request) -> Response:
            front: Front = request.app.state.front
            try:
                made = await handler(front, request)
            except asyncio.CancelledError:  # uvicorn would answer 500
                return refused(CancelledError("the server ends: ask again when it is back"), form)
            except Exception as problem:
                return refused(problem, form)
            return made if isinstance(made, Response) else Json(made)

        # FastAPI reads the signature of what it calls.
        guarded.__annotations__ = {"request": Request, "return": Response}
        del guarded.__dict__["__wrapped__"]
        for path in paths:
            router.add_api_route(
                path,
                guarded,
                methods=[method],
                include_in_schema=path == paths[0],
                openapi_extra=_described(body),
                response_model=None,
            )
        return handler

    return register


def _described(body: type[Body] | None) -> dict[str, Any] | None:
    if body is None:
        return None
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def closing(events: AsyncIterator[Event], opened: Opened) -> AsyncIterator[Event]:
    """The events of an answer, which ends when nobody reads them any more."""
    try:
        async for event in events:
            yield event
    finally:
        opened.cancel()
