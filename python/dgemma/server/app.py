"""The application: routes over an engine, who may ask, and what the rest of the web is told."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from .._native import version
from .engine import Engine, Settings
from .envelope import Envelope, not_found, with_cors
from .front import Front, refused
from .guard import Guard
from .page import document
from .routes import ROUTERS


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """The application over an engine, whichever and wherever it is."""
    settings = settings or Settings()
    front = Front(engine, settings, document())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()
        front.parsing.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="dgemma", version=version(), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    front.paths["/openapi.json"] = {"GET"}
    app.state.front = front
    for router in ROUTERS:
        app.include_router(router)
        for path in router.routes:
            if isinstance(path, APIRoute):
                front.paths.setdefault(path.path, set()).update(path.methods or ())

    @app.exception_handler(404)
    async def unknown(request: Request, _: Exception) -> Response:
        return refused(not_found(front, request.url.path))

    @app.exception_handler(Exception)
    async def failed(_: Request, problem: Exception) -> Response:
        return refused(problem)

    # The last one is the outermost: whoever asks from elsewhere has no key to show in a preflight.
    app.add_middleware(Envelope, paths=front.paths)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(with_cors, origins=tuple(settings.origins))
    return app
