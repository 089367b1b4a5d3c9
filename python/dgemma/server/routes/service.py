"""The server itself: its page, its health, its figures."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, PlainTextResponse

from ..._native import version
from ..front import Front, route

PROMETHEUS = "text/plain; version=0.0.4"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:; base-uri 'none'; frame-ancestors 'none'"
)
router = APIRouter()


@route(router, "GET", "/")
async def index(front: Front, request: Request) -> HTMLResponse:
    """The page."""
    return HTMLResponse(front.page, headers={"Content-Security-Policy": PAGE_POLICY})


@route(router, "GET", "/health", "/v1/health")
async def health(front: Front, request: Request) -> dict[str, str]:
    """Whether the server is up."""
    return {"status": "ok"}


@route(router, "GET", "/metrics")
async def metrics(front: Front, request: Request) -> PlainTextResponse:
    """Counters for Prometheus."""
    return PlainTextResponse(front.engine.metrics(), media_type=PROMETHEUS)


@route(router, "GET", "/props")
async def props(front: Front, request: Request) -> dict[str, Any]:
    """Sizes of the model, and what a request leaves open."""
    card = front.engine.card
    settings = {"n_ctx": card.n_ctx, "params": dict(card.sampling)}
    return {
        "version": version(),
        "build_info": f"dgemma {version()}",
        "model": card.name,
        "model_path": card.file,
        "n_ctx": card.n_ctx,
        "sampling": card.sampling,
        "info": card.info,
        "default_generation_settings": settings,
        "total_slots": card.n_slots,
        "chat_template": card.chat_template,
        "bos_token": card.bos_token,
        "eos_token": card.eos_token,
        "modalities": {"vision": False, "audio": False},
    }


@route(router, "GET", "/slots")
async def slots(front: Front, request: Request) -> list[dict[str, Any]]:
    """The conversations whose beginnings are kept."""
    return front.engine.slots()
