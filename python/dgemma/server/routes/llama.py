"""What llama.cpp's server offers beside OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..front import Front, route
from ..schemas import DetokenizeRequest, TemplateRequest, TokenizeRequest

router = APIRouter()


@route(router, "POST", "/tokenize", body=TokenizeRequest)
async def tokenize(front: Front, request: Request) -> dict[str, Any]:
    """Token ids of a text."""
    asked = await front.read(request, TokenizeRequest)
    special = asked.parse_special is not False
    tokens = await front.engine.tokenize(
        asked.content, add_special=bool(asked.add_special), parse_special=special
    )
    if not asked.with_pieces:
        return {"tokens": tokens}
    pieces = await front.engine.detokenize(tokens)
    return {
        "tokens": [
            {"id": id, "piece": _text_or_bytes(piece)}
            for id, piece in zip(tokens, pieces, strict=True)
        ]
    }


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
    thinking = (asked.chat_template_kwargs or {}).get("enable_thinking", False)
    prompt = await front.engine.render(
        asked.messages, tools=asked.tools, enable_thinking=bool(thinking)
    )
    return {"prompt": prompt}
