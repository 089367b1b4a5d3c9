"""OpenAI's responses API, as Codex and the newer clients use it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..dialects.response_writer import ResponseWriter
from ..dialects.responses import Asked, asked
from ..engine import Ask, JsonObject, Opened
from ..failures import BadRequestError, failure
from ..front import Front, Json, client_of, closing, route, warned
from ..guard import given_key
from ..requests import chat_options
from ..schemas import ResponsesRequest
from ..store import Kept, OwnPast
from ..streaming import comment, event, stream

MAX_LISTED = 100  # items of a response in one answer
router = APIRouter()


@route(router, "POST", "/v1/responses", "/responses", body=ResponsesRequest)
async def respond(front: Front, request: Request) -> Response:
    """Answers a conversation, which is sent as a whole or goes on from an earlier response."""
    body = (await front.read(request, ResponsesRequest)).given()
    owner = _owner(front, request)
    found = asked(body, OwnPast(front.kept, owner))
    options = chat_options(found.fields, strict=front.settings.strict, notes=found.notes)
    streamed = bool(body.get("stream"))
    ask = Ask("chat", options, streamed, client=client_of(request, body.get("user")))
    stored = front.settings.kept_bytes > 0 and body.get("store") is not False
    writer = ResponseWriter(body, front.engine.card.name, found.called, stored=stored)

    async def keep() -> None:
        if stored:
            await _keep(front, owner, writer.response, found, body)

    if streamed:
        opened = await front.engine.open(ask)
        parts = _parts(opened, writer, keep)
        return stream(parts, lambda: comment(opened.progress), warned(opened.warnings))
    opened, made, end = await front.whole(request, ask)
    (choice, *_) = made.data["choices"]
    for _ in writer.feed(choice["message"]):
        pass
    for _ in writer.finish(choice["finish_reason"], end.data["usage"]):
        pass
    if opened.warnings:
        writer.response["warnings"] = list(opened.warnings)
    await keep()
    return Json(writer.response, headers=warned(opened.warnings))


@route(
    router,
    "POST",
    "/v1/responses/input_tokens",
    "/responses/input_tokens",
    body=ResponsesRequest,
)
async def count(front: Front, request: Request) -> JsonObject:
    """How many tokens a conversation has."""
    body = (await front.read(request, ResponsesRequest)).given()
    found = asked(body, OwnPast(front.kept, _owner(front, request)))
    options = chat_options(found.fields, strict=False)
    n_tokens = await front.engine.count(
        options["messages"],
        tools=options.get("tools"),
        enable_thinking=bool(options.get("enable_thinking", False)),
    )
    return {"object": "response.input_tokens", "input_tokens": n_tokens}


@route(router, "GET", "/v1/responses/{id}", "/responses/{id}")
async def retrieve(front: Front, request: Request) -> JsonObject:
    """A response that was kept."""
    if request.query_params.get("stream", "false").lower() == "true":
        raise BadRequestError(
            "stream is not supported here: a response that is kept is whole", param="stream"
        )
    return _kept(front, request).response


@route(router, "DELETE", "/v1/responses/{id}", "/responses/{id}")
async def forget(front: Front, request: Request) -> JsonObject:
    """Forgets a response."""
    id = _kept(front, request).response["id"]
    front.kept.delete(_owner(front, request), id)
    return {"id": id, "object": "response", "deleted": True}


@route(router, "GET", "/v1/responses/{id}/input_items", "/responses/{id}/input_items")
async def input_items(front: Front, request: Request) -> JsonObject:
    """What was new in the request of a response, the last item first."""
    query = request.query_params
    items = list(_kept(front, request).items)
    if query.get("order", "desc") != "asc":
        items.reverse()
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in items]
        items = items[ids.index(after) + 1 :] if after in ids else []
    limit = query.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MAX_LISTED:
        raise BadRequestError(f"limit is {limit[:20]!r}: expected 1 to {MAX_LISTED}", param="limit")
    shown = items[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > len(shown),
    }


@route(router, "POST", "/v1/responses/{id}/cancel", "/responses/{id}/cancel")
async def cancel(front: Front, request: Request) -> JsonObject:
    """A response that is kept is whole: there is nothing to cancel."""
    return _kept(front, request).response


def _owner(front: Front, request: Request) -> str:
    """Whose responses a request may see: those that were asked for with the same key."""
    return given_key(request).decode("latin-1") if front.settings.api_keys else ""


def _kept(front: Front, request: Request) -> Kept:
    id = request.path_params["id"]
    kept = front.kept.get(_owner(front, request), id)
    if kept is None:
        raise BadRequestError(
            f"there is no response {id[:100]!r} here: it was asked with `store` false, is too old, "
            "or was made by another server",
            404,
            param="id",
            code="response_not_found",
        )
    return kept


async def _keep(
    front: Front, owner: str, response: JsonObject, found: Asked, body: Mapping[str, Any]
) -> None:
    items = [_listed(item) for item in found.items]
    await asyncio.get_running_loop().run_in_executor(
        front.parsing, front.kept.add, owner, response, items, body.get("previous_response_id")
    )


def _listed(item: JsonObject) -> JsonObject:
    """An item as it is listed: with an id, and a text as a part."""
    kind = item.get("type") or "message"
    made = {"id": f"{'msg' if kind == 'message' else 'item'}_{secrets.token_hex(16)}", **item}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        made["content"] = [{"type": part, "text": item["content"]}]
    return {**made, "type": kind}


async def _parts(
    opened: Opened, writer: ResponseWriter, keep: Callable[[], Awaitable[None]]
) -> AsyncIterator[bytes]:
    reason = None
    try:
        if opened.warnings:
            writer.response["warnings"] = list(opened.warnings)
        for told in writer.begin():
            yield event(told, told["type"])
        async for made in closing(opened.events(), opened):
            if made.name == "chunk":
                for choice in made.data["choices"]:
                    reason = choice["finish_reason"] or reason
                    for told in writer.feed(choice["delta"]):
                        yield event(told, told["type"])
            elif made.name == "end":
                last = list(writer.finish(reason, made.data["usage"]))
                await keep()  # whoever reads the end may go on from it
                for told in last:
                    yield event(told, told["type"])
    except Exception as problem:
        failed = failure(problem)
        told = writer.fail(failed.code, failed.message)
        yield event(told, told["type"])
    finally:
        opened.cancel()
