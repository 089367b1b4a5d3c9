"""OpenAI's responses API, as Codex and the newer clients use it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..dialects.responses import ResponseWriter, chat_fields
from ..engine import Ask, Opened
from ..failures import failure
from ..front import Front, Json, client_of, closing, route, warned
from ..requests import chat_options
from ..schemas import ResponsesRequest
from ..streaming import comment, event, stream

router = APIRouter()


@route(router, "POST", "/v1/responses", "/responses", body=ResponsesRequest)
async def respond(front: Front, request: Request) -> Response:
    """Answers a conversation, which is sent as a whole: answers are not kept."""
    body = (await front.read(request, ResponsesRequest)).given()
    fields, custom = chat_fields(body)
    options = chat_options(fields, strict=front.settings.strict)
    streamed = bool(body.get("stream"))
    ask = Ask("chat", options, streamed, client=client_of(request, body.get("user")))
    writer = ResponseWriter(body, front.engine.card.name, custom)
    if streamed:
        opened = await front.engine.open(ask)
        parts = _parts(opened, writer)
        return stream(parts, lambda: comment(opened.progress), warned(opened.warnings))
    opened, made, end = await front.whole(request, ask)
    (choice, *_) = made.data["choices"]
    for _ in writer.feed(choice["message"]):
        pass
    for _ in writer.finish(choice["finish_reason"], end.data["usage"]):
        pass
    if opened.warnings:
        writer.response["warnings"] = list(opened.warnings)
    return Json(writer.response, headers=warned(opened.warnings))


async def _parts(opened: Opened, writer: ResponseWriter) -> AsyncIterator[bytes]:
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
                for told in writer.finish(reason, made.data["usage"]):
                    yield event(told, told["type"])
    except Exception as problem:
        failed = failure(problem)
        told = writer.fail(failed.code, failed.message)
        yield event(told, told["type"])
    finally:
        opened.cancel()
