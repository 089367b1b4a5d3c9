"""The application: endpoints, their errors, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from .._native import version
from ..compat.completions import ChatCompletion, Completion, usage
from ..errors import CancelledError, ContextLengthError, Error, ResponseFormatError
from ..generation.generate import Draft
from ..model import DiffusionGemma
from .guard import Guard
from .jobs import Job, QueueFullError, Worker
from .metrics import Metrics
from .schemas import (
    BadRequestError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TemplateRequest,
    TokenizeRequest,
    parse,
)

MAX_BODY = 8 * 2**20
BODY_SECONDS = 30.0  # a request that is sent more slowly is dropped
RETRY_AFTER = 2
PROMETHEUS = "text/plain; version=0.0.4"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
)

R = TypeVar("R", bound=BaseModel)
AnyCompletion = ChatCompletion | Completion


def create_app(
    llm: DiffusionGemma,
    *,
    alias: str,
    api_key: str | None = None,
    max_queue: int = 8,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The application over a model; `hosts`: names it may be addressed by, None for any."""
    worker, metrics = Worker(max_queue), Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(worker.close)

    app = FastAPI(
        title="dgemma",
        version=version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_middleware(Guard, api_key=api_key, hosts=hosts)
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    created = int(time.time())

    @app.exception_handler(Exception)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def failed(_: Request, problem: Exception) -> JSONResponse:
        return _failure(problem)

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": alias, "object": "model", "created": created, "owned_by": "dgemma"}
        return {"object": "list", "data": [entry]}

    @app.get("/props")
    async def props() -> dict[str, Any]:
        info = {n: v for n, v in vars(llm.info).items() if n != "sampling"}
        return {
            "version": version(),
            "model": alias,
            "n_ctx": llm.n_ctx(),
            "sampling": vars(llm.sampling),
            "info": info,
        }

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(worker.n_live), media_type=PROMETHEUS)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        async def answer() -> Any:
            asked = await _read(request, TokenizeRequest)
            return {
                "tokens": await run_in_threadpool(
                    llm.tokenize,
                    asked.content,
                    add_bos=asked.add_special,
                    special=asked.parse_special,
                )
            }

        return await _guarded(answer())

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        async def answer() -> Any:
            asked = await _read(request, DetokenizeRequest)
            text = await run_in_threadpool(llm.tokenizer.decode, asked.tokens, special=True)
            return {"content": text}

        return await _guarded(answer())

    @app.post("/apply-template")
    async def apply_template(request: Request) -> Response:
        async def answer() -> Any:
            asked = await _read(request, TemplateRequest)
            thinking = (asked.chat_template_kwargs or {}).get("enable_thinking", False)
            prompt = await run_in_threadpool(
                llm.chat_template.render,
                asked.messages,
                tools=asked.tools,
                enable_thinking=thinking,
            )
            return {"prompt": prompt}

        return await _guarded(answer())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        async def answer() -> Any:
            asked = await _read(request, ChatRequest)
            options = {**asked.options(), "model": alias}
            messages = options.pop("messages")
            made = await run_in_threadpool(ChatCompletion, llm, messages, **options)
            return await respond(request, made, asked)

        return await _guarded(answer())

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        async def answer() -> Any:
            asked = await _read(request, CompletionRequest)
            options = {**asked.options(), "model": alias}
            prompt = options.pop("prompt")
            made = await run_in_threadpool(Completion, llm, prompt, **options)
            return await respond(request, made, asked)

        return await _guarded(answer())

    async def respond(
        request: Request, made: AnyCompletion, asked: ChatRequest | CompletionRequest
    ) -> Any:
        if asked.stream:
            job = Job(made.answer, made.events(), llm.cancel)
            worker.submit(job)
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            stream = _stream(job, made, asked.drafts, with_usage)
            return StreamingResponse(
                metrics.counted(stream, made.answer),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        # In one piece: the worker makes a single event, the whole answer.
        job = Job(made.answer, iter(_Once(made)), llm.cancel)
        worker.submit(job)
        gone = asyncio.create_task(_wait_until_gone(request, job))
        try:
            async for whole in metrics.counted(job.events(), made.answer):
                return whole
        finally:
            gone.cancel()
            job.cancel()
        raise CancelledError("the client went away")

    async def _stream(
        job: Job, made: AnyCompletion, with_drafts: bool, with_usage: bool
    ) -> AsyncIterator[bytes]:
        head: dict[str, Any] = {}
        try:
            async for event in job.events():
                if isinstance(event, Draft):
                    if with_drafts:
                        yield _event(draft_json(llm, event), name="draft")
                    continue
                head = {n: event[n] for n in ("id", "object", "created", "model")}
                yield _event({**event, "usage": None} if with_usage else event)
            if with_usage:
                result = made.answer.result
                figures = {**vars(result.stats)}
                yield _event({**head, "choices": [], "usage": usage(result), "timings": figures})
            yield b"data: [DONE]\n\n"
        except Exception as problem:
            yield _event(_error(problem)[1])
        finally:
            job.cancel()

    return app


class _Once:
    """A whole completion as an iteration of one, made when it is asked for."""

    def __init__(self, made: AnyCompletion) -> None:
        self._made = made

    def __iter__(self) -> Any:
        yield self._made.whole()


def draft_json(llm: DiffusionGemma, draft: Draft) -> dict[str, Any]:
    """A draft as clients see it: one text per token up to the first end token."""
    decoder = llm.tokenizer.decoder()
    ends = [i for i, token in enumerate(draft.tokens) if token in llm.info.end_tokens]
    n = ends[0] if ends else len(draft.tokens)
    return {
        "canvas": draft.canvas,
        "step": draft.step,
        "tokens": draft.tokens[:n],
        "pieces": [decoder.feed(token) for token in draft.tokens[:n]],
        "entropies": [round(float(value), 4) for value in draft.entropies[:n]],
        "mean_entropy": draft.mean_entropy,
        "n_accepted": draft.n_accepted,
        "settled": draft.settled,
    }


async def _read(request: Request, kind: type[R]) -> R:
    kind_of_body = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind_of_body != "application/json":
        raise BadRequestError("the body must be sent as Content-Type: application/json", 415)
    try:
        body = await asyncio.wait_for(_body(request), BODY_SECONDS)
    except asyncio.TimeoutError:  # another class than TimeoutError before 3.11
        raise BadRequestError("the body did not arrive in time", 408) from None
    return await run_in_threadpool(parse, body, kind)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise BadRequestError(f"the body is larger than {MAX_BODY} bytes", 413)
    return bytes(body)


async def _wait_until_gone(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _guarded(answer: Any) -> Response:
    try:
        value = await answer
    except Exception as problem:
        return _failure(problem)
    return value if isinstance(value, Response) else JSONResponse(value)


def _event(value: dict[str, Any], name: str | None = None) -> bytes:
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


def _failure(problem: Exception) -> JSONResponse:
    status, body = _error(problem)
    headers = {"Retry-After": str(RETRY_AFTER)} if status == 503 else None
    return JSONResponse(body, status, headers=headers)


def _error(problem: Exception) -> tuple[int, dict[str, Any]]:
    status, kind = 500, "server_error"
    if isinstance(problem, ContextLengthError):
        status, kind = 400, "exceed_context_size_error"
    elif isinstance(problem, QueueFullError):
        status, kind = 503, "unavailable_error"
    elif isinstance(problem, BadRequestError):
        status, kind = problem.status, "invalid_request_error"
    elif isinstance(problem, ResponseFormatError):
        status, kind = 422, "response_format_error"
    elif isinstance(problem, CancelledError):
        status, kind = 503, "cancelled_error"
    elif isinstance(problem, ValueError | TypeError):
        status, kind = 400, "invalid_request_error"
    elif hasattr(problem, "status_code"):  # not found, method not allowed
        status, kind = problem.status_code, "invalid_request_error"
        problem = Exception(getattr(problem, "detail", "not found"))
    # What a bug says about the inside is not for clients.
    known = status != 500 or isinstance(problem, Error)
    message = str(problem) if known else "the server failed; its log says why"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
