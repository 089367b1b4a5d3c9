"""Anthropic's messages API, as Claude Code uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..dialects.messages import MessageWriter, chat_fields, error_form
from ..engine import Ask, Event, JsonObject, Opened
from ..failures import failure
from ..front import Front, Json, client_of, closing, route, warned
from ..requests import chat_options, thinking
from ..schemas import CountRequest, MessagesRequest
from ..streaming import event, stream

PING = event({"type": "ping"}, "ping")
router = APIRouter()


@route(router, "POST", "/v1/messages", "/messages", body=MessagesRequest, form=error_form)
async def answer(front: Front, request: Request) -> Response:
    """Answers a conversation."""
    body = (await front.read(request, MessagesRequest)).given()
    options = chat_options(chat_fields(body), strict=front.settings.strict)
    streamed = bool(body.get("stream"))
    user = (body.get("metadata") or {}).get("user_id")
    ask = Ask("chat", options, streamed, client=client_of(request, user))
    writer = MessageWriter(front.engine.card.name)
    if streamed:
        opened = await front.engine.open(ask)
        return stream(_parts(opened, writer), lambda: PING, warned(opened.warnings))
    opened, made, end = await front.whole(request, ask)
    (choice, *_) = made.data["choices"]
    for _ in writer.feed(choice["message"]):
        pass
    for _ in writer.finish(choice["finish_reason"], end.data["usage"], _stopped_by(end)):
        pass
    if opened.warnings:
        writer.message["warnings"] = list(opened.warnings)
    return Json(writer.message, headers=warned(opened.warnings))


@route(
    router,
    "POST",
    "/v1/messages/count_tokens",
    "/messages/count_tokens",
    body=CountRequest,
    form=error_form,
)
async def count(front: Front, request: Request) -> JsonObject:
    """How many tokens a conversation has."""
    body = (await front.read(request, CountRequest)).given()
    options = chat_options(chat_fields(body), strict=False)
    n_tokens = await front.engine.count(
        options["messages"],
        tools=options.get("tools"),
        enable_thinking=thinking(options.get("chat_template_kwargs")),
    )
    return {"input_tokens": n_tokens}


def _stopped_by(end: Event) -> str | None:
    """The stop string at which the answer ended."""
    found = end.data["stats"][0].get("stopped_by")
    return found if isinstance(found, str) else None


async def _parts(opened: Opened, writer: MessageWriter) -> AsyncIterator[bytes]:
    reason = None
    try:
        begun = writer.begin()
        if opened.warnings:
            begun["message"]["warnings"] = list(opened.warnings)
        yield event(begun, begun["type"])
        yield PING
        async for made in closing(opened.events(), opened):
            if made.name == "chunk":
                for choice in made.data["choices"]:
                    reason = choice["finish_reason"] or reason
                    for told in writer.feed(choice["delta"]):
                        yield event(told, told["type"])
            elif made.name == "end":
                for told in writer.finish(reason, made.data["usage"], _stopped_by(made)):
                    yield event(told, told["type"])
    except Exception as problem:
        yield event(error_form(failure(problem)), "error")
    finally:
        opened.cancel()
