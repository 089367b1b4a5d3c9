"""Who may ask: the key, and the names that the server may be addressed by."""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse

OPEN_PATHS = frozenset(["/health"])


class Guard:
    """Lets a request through, or answers 401 or 403.

    The key comes as a bearer token, or, so that a browser can ask for it, as the password of
    basic authentication. `hosts`: a page of another site must not reach a local server through a
    name that it points at this machine, so only known names are served.
    """

    def __init__(self, app: Any, *, api_key: str | None, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI's entry."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            refused = self._refusal(HTTPConnection(scope))
            if refused is not None:
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: HTTPConnection) -> JSONResponse | None:
        if self._hosts is not None and _host(request) not in self._hosts:
            return _refused(403, "this server does not answer to that host name")
        if self._key is None or hmac.compare_digest(_given_key(request), self._key):
            return None
        return _refused(401, "a valid API key is needed: Authorization: Bearer …")


def _host(request: HTTPConnection) -> str:
    host = request.headers.get("host", "").lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rsplit(":", 1)[0]


def _given_key(request: HTTPConnection) -> bytes:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _refused(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "authentication_error", "param": None, "code": status}
    headers = {"WWW-Authenticate": 'Basic realm="dgemma"'} if status == 401 else None
    return JSONResponse({"error": error}, status, headers=headers)
