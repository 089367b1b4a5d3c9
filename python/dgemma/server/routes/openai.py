"""OpenAI's chat and text completions, and its list of models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..engine import Ask, Event, JsonObject, Opened
from ..failures import BadRequestError, failure
from ..front import Front, Json, client_of, closing, route, warned
from ..requests import chat_options, completion_options
from ..schemas import Body, ChatRequest, CompletionRequest, Generation
from ..streaming import DONE, comment, event, stream

router = APIRouter()


@route(router, "GET", "/v1/models", "/models")
async def models(front: Front, request: Request) -> JsonObject:
    """The model."""
    return {"object": "list", "data": [_entry(front)]}


@route(router, "GET", "/v1/models/{name:path}", "/models/{name:path}")
async def model(front: Front, request: Request) -> JsonObject:
    """The model, by its name."""
    name = request.path_params["name"]
    if name != front.engine.card.name:
        raise BadRequestError(
            f"there is no model {name!r} here: it is called {front.engine.card.name!r}",
            404,
            param="model",
            code="model_not_found",
        )
    return _entry(front)


def _entry(front: Front) -> JsonObject:
    card = front.engine.card
    info = card.info
    return {
        "id": card.name,
        "object": "model",
        "created": front.created,
        "owned_by": "dgemma",
        "context_length": card.n_ctx,
        "max_model_len": card.n_ctx,
        "meta": {
            "n_ctx": card.n_ctx,
            "n_ctx_train": info["context_length"],
            "n_vocab": info["n_vocab"],
            "n_embd": info["n_embd"],
            "n_params": info["n_parameters"],
            "size": info["weight_bytes"],
        },
    }


@route(router, "POST", "/v1/chat/completions", "/chat/completions", body=ChatRequest)
async def chat(front: Front, request: Request) -> Response:
    """Answers a conversation."""
    asked = await front.read(request, ChatRequest)
    options = chat_options(asked.given(), strict=front.settings.strict)
    return await _answer(front, request, asked, "chat", options)


@route(router, "POST", "/v1/completions", "/completions", body=CompletionRequest)
async def complete(front: Front, request: Request) -> Response:
    """Continues a text, or each of several."""
    asked = await front.read(request, CompletionRequest)
    options = completion_options(asked.given(), strict=front.settings.strict)
    return await _answer(front, request, asked, "completion", options)


@route(router, "POST", "/v1/embeddings", "/embeddings", body=Body)
async def embed(front: Front, request: Request) -> Response:
    """Refused: the model writes text."""
    raise BadRequestError(
        "DiffusionGemma gives no embeddings: it was trained to write text. "
        "Use a model that was made for them",
        501,
        code="unsupported",
    )


async def _answer(
    front: Front,
    request: Request,
    asked: Generation,
    kind: Literal["chat", "completion"],
    options: dict[str, Any],
) -> Response:
    stream_options = options.pop("stream_options", None)
    if stream_options is not None and not isinstance(stream_options, dict):
        raise BadRequestError(
            "stream_options must be an object", param="stream_options", code="invalid_type"
        )
    ask = Ask(
        kind=kind,
        options=options,
        stream=bool(asked.stream),
        drafts=bool(asked.drafts),
        client=client_of(request, (asked.model_extra or {}).get("user")),
    )
    if not ask.stream:
        opened, made, _ = await front.whole(request, ask)
        return Json(made.data, headers=warned(opened.warnings))
    opened = await front.engine.open(ask)
    with_usage = bool((stream_options or {}).get("include_usage"))
    parts = _parts(opened, with_usage)
    return stream(parts, lambda: comment(opened.progress), warned(opened.warnings))


async def _parts(opened: Opened, with_usage: bool) -> AsyncIterator[bytes]:
    head: JsonObject = {}

    def chunk(value: JsonObject) -> bytes:
        nonlocal head
        if not head and opened.warnings:
            value = {**value, "warnings": list(opened.warnings)}
        head = {n: value[n] for n in ("id", "object", "created", "model")}
        return event({**value, "usage": None} if with_usage else value)

    try:
        for opening in opened.opening:
            yield chunk(opening)
        async for made in closing(opened.events(), opened):
            if made.name == "draft":
                yield event(made.data, "draft")
            elif made.name == "chunk":
                yield chunk(made.data)
            elif with_usage:
                yield event(_figures(head, made))
        yield DONE
    except Exception as problem:
        yield event(failure(problem).body)
    finally:
        opened.cancel()


def _figures(head: JsonObject, end: Event) -> JsonObject:
    """The last chunk, with token counts and, of the first answer, seed, steps and times."""
    return {**head, "choices": [], "usage": end.data["usage"], "timings": end.data["stats"][0]}
