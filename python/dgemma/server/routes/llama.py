"""What llama.cpp's server offers beside OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..body import encode_ids
from ..engine import Ask, JsonObject, Opened
from ..failures import BadRequestError, failure
from ..front import Front, Json, client_of, closing, route, warned
from ..requests import completion_options, thinking
from ..schemas import (
    DetokenizeRequest,
    InfillRequest,
    LlamaRequest,
    TemplateRequest,
    TokenizeRequest,
)
from ..streaming import comment, event, stream

router = APIRouter()

MAX_TOKENIZE = 2**18  # characters
MAX_PIECES = 2**14


@route(router, "POST", "/completion", body=LlamaRequest)
async def complete(front: Front, request: Request) -> Response:
    """Continues a text, in llama.cpp's own form."""
    given = (await front.read(request, LlamaRequest)).given()
    given.setdefault("max_tokens", -1)  # llama.cpp's default: until the model ends
    return await _answer(front, request, given)


@route(router, "POST", "/infill", body=InfillRequest)
async def infill(front: Front, request: Request) -> Response:
    """Fills the gap between a prefix and a suffix, whose beginning is pinned on the canvas."""
    given = (await front.read(request, InfillRequest)).given()
    before = [
        f"{extra.get('filename', '')}\n{extra['text']}\n"
        for extra in given.pop("input_extra", [])
        if isinstance(extra.get("text"), str)
    ]
    suffix = given.pop("input_suffix")
    prompt = "".join([*before, given.pop("input_prefix"), given.pop("prompt", "")])
    n_predict = given.get("n_predict", -1)
    if n_predict == -1:
        given["n_predict"] = front.engine.card.canvas_length // 2
    if suffix:
        given["suffix"] = suffix
    return await _answer(front, request, {**given, "prompt": prompt})


async def _answer(front: Front, request: Request, given: dict[str, Any]) -> Response:
    if "n_predict" in given:
        given["max_tokens"] = given.pop("n_predict")
    options = completion_options(given, strict=front.settings.strict)
    streamed = bool(given.get("stream"))
    ask = Ask("completion", options, streamed, client=client_of(request))
    card = front.engine.card
    if not streamed:
        opened, made, end = await front.whole(request, ask)
        made_of = zip(made.data["choices"], end.data["stats"], strict=True)
        found = [
            {**_last(card.name, c["text"], c["finish_reason"], stats), "index": i}
            for i, (c, stats) in enumerate(made_of)
        ]
        if opened.warnings:
            found[0]["warnings"] = list(opened.warnings)
        # Of several prompts a list, as llama.cpp has it.
        return Json(found[0] if len(found) == 1 else found, headers=warned(opened.warnings))
    opened = await front.engine.open(ask)
    parts = _parts(opened, card.name)
    return stream(parts, lambda: comment(opened.progress), warned(opened.warnings))


async def _parts(opened: Opened, name: str) -> AsyncIterator[bytes]:
    reasons: dict[int, str] = {}
    try:
        async for made in closing(opened.events(), opened):
            if made.name == "chunk":
                (choice,) = made.data["choices"]
                index = choice["index"]
                if choice["finish_reason"]:
                    reasons[index] = choice["finish_reason"]
                if choice["text"]:
                    yield event({"content": choice["text"], "stop": False, "index": index})
            elif made.name == "end":
                for index, stats in enumerate(made.data["stats"]):
                    last = _last(name, "", reasons.get(index), stats)
                    more = {"warnings": list(opened.warnings)} if opened.warnings else {}
                    yield event({**last, **more, "index": index})
    except Exception as problem:
        yield event(failure(problem).body)
    finally:
        opened.cancel()


def _last(name: str, content: str, reason: str | None, stats: JsonObject) -> JsonObject:
    """A whole answer, or the last event of a streamed one, with its figures."""
    timings, stopped_by = stats.get("timings", {}), stats.get("stopped_by")
    ended = "limit" if reason == "length" else "eos" if stopped_by is None else "word"
    return {
        "content": content,
        "stop": True,
        "model": name,
        "stop_type": ended,
        "stopping_word": stopped_by or "",
        "truncated": False,
        "tokens_predicted": stats["completion_tokens"],
        "tokens_evaluated": stats["prompt_tokens"],
        "tokens_cached": stats["cached_tokens"],
        "timings": {
            "prompt_n": stats["prompt_tokens"] - stats["cached_tokens"],
            "prompt_ms": 1e3 * timings.get("prompt_s", 0.0),
            "predicted_n": stats["completion_tokens"],
            "predicted_ms": 1e3 * timings.get("generation_s", 0.0),
            "predicted_per_second": timings.get("tokens_per_s", 0.0),
        },
        "generation_settings": {"seed": stats.get("seed")},
    }


@route(router, "POST", "/tokenize", body=TokenizeRequest)
async def tokenize(front: Front, request: Request) -> Response:
    """Token ids of a text."""
    asked = await front.read(request, TokenizeRequest)
    if len(asked.content) > MAX_TOKENIZE:
        raise BadRequestError(
            f"content has {len(asked.content)} characters: at most {MAX_TOKENIZE}",
            413,
            param="content",
        )
    special = asked.parse_special is not False
    tokens = await front.engine.tokenize(
        asked.content, add_special=bool(asked.add_special), parse_special=special
    )
    if not asked.with_pieces:
        encoded = await asyncio.get_running_loop().run_in_executor(
            front.parsing, encode_ids, tokens
        )
        return Response(b'{"tokens":' + encoded + b"}", media_type="application/json")
    if len(tokens) > MAX_PIECES:
        raise BadRequestError(
            f"content has {len(tokens)} tokens: with pieces, at most {MAX_PIECES}", 413
        )
    pieces = await front.engine.detokenize(tokens)
    return Json(
        {
            "tokens": [
                {"id": id, "piece": _text_or_bytes(piece)}
                for id, piece in zip(tokens, pieces, strict=True)
            ]
        }
    )


def _text_or_bytes(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


@route(router, "POST", "/detokenize", body=DetokenizeRequest)
async def detokenize(front: Front, request: Request) -> dict[str, str]:
    """The text of token ids."""
    asked = await front.read(request, DetokenizeRequest)
    pieces = await front.engine.detokenize(asked.tokens)
    return {"content": b"".join(pieces).decode("utf-8", "replace")}


@route(router, "POST", "/apply-template", body=TemplateRequest)
async def apply_template(front: Front, request: Request) -> dict[str, str]:
    """The prompt for a conversation."""
    asked = await front.read(request, TemplateRequest)
    prompt = await front.engine.render(
        asked.messages,
        tools=asked.tools,
        enable_thinking=thinking(asked.chat_template_kwargs),
    )
    return {"prompt": prompt}
