"""What HTTP asks of every path alike: HEAD, OPTIONS, methods that are allowed, paths there are."""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from .failures import BadRequestError
from .front import Front, refused


class Envelope:
    """Around the whole application.

    HEAD is answered as GET without its body. OPTIONS says which methods a path has. Every answer
    carries an id, `X-Request-ID`, the client's own where it sent one.
    """

    def __init__(self, app: Any, *, paths: Mapping[str, set[str]]) -> None:
        self._app = app
        self._paths = [
            (compile_path(path)[0], sorted(methods | {"OPTIONS"} | ({"HEAD"} & {_head(methods)})))
            for path, methods in paths.items()
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI's entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, head = Request(scope), scope["method"] == "HEAD"
        id = request.headers.get("x-request-id", "")
        # What a client sent goes back into a header: only what is plainly an id.
        id = id if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", id) else secrets.token_hex(8)

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        allowed = self._allowed(scope["path"])
        if scope["method"] == "OPTIONS" and allowed:
            answer = Response(status_code=204, headers={"Allow": ", ".join(allowed)})
            await answer(scope, receive, sent)
        elif allowed and scope["method"] not in allowed:
            problem = BadRequestError(
                f"{scope['method'][:20]} is not for {scope['path'][:200]}: "
                f"use {' or '.join(allowed)}",
                405,
                headers={"Allow": ", ".join(allowed)},
            )
            await refused(problem)(scope, receive, sent)
        else:
            await self._app({**scope, "method": "GET"} if head else scope, receive, sent)

    def _allowed(self, path: str) -> list[str]:
        return next((methods for pattern, methods in self._paths if pattern.match(path)), [])


def _head(methods: set[str]) -> str:
    return "HEAD" if "GET" in methods else ""


def with_cors(app: Any, origins: tuple[str, ...]) -> Any:
    """Lets pages of these other sites ask; never with a browser's own credentials."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=["X-Request-ID", "X-Dgemma-Warnings", "Retry-After"],
        allow_private_network=True,
    )


def not_found(front: Front, path: str) -> BadRequestError:
    """What to say of a path that there is none of."""
    shown = sorted(path for path in front.paths if "{" not in path)
    near = difflib.get_close_matches(path, shown, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}? " if near else ""
    if path.startswith("/api/"):
        hint = "this is Ollama's API; choose OpenAI's in your client, with /v1 as the address. "
    return BadRequestError(
        f"there is no {path[:200]} here{': ' if hint else '. '}{hint}"
        f"The paths are {', '.join(shown)}",
        404,
    )
