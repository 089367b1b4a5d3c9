"""Who may ask: the key, and the names that the server may be addressed by."""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import Response

from .engine import Settings
from .failures import BadRequestError
from .front import refused

OPEN_PATHS = frozenset(["/health"])


class Guard:
    """Lets a request through, or answers 401 or 403.

    The key comes as a bearer token, or, so that a browser can ask for it, as the password of
    basic authentication. `hosts`: a page of another site must not reach a local server through a
    name that it points at this machine, so only known names are served.
    """

    def __init__(self, app: Any, *, settings: Settings) -> None:
        self._app, self._hosts = app, settings.hosts
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI's entry."""
        # OPTIONS tells nothing but methods, and browsers send it without a key.
        if scope["type"] == "http" and not (
            scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"
        ):
            refused = self._refusal(HTTPConnection(scope))
            if refused is not None:
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        if self._hosts is not None and _host(request) not in self._hosts:
            return refused(
                BadRequestError(
                    f"this server does not answer to the host name {_host(request)[:100]!r}: "
                    "start it with --allowed-host to let it",
                    403,
                )
            )
        if not self._keys or self._is_known(given_key(request)):
            return None
        return refused(
            BadRequestError(
                "a valid API key is needed: Authorization: Bearer …",
                401,
                headers={"WWW-Authenticate": 'Basic realm="dgemma"'},
            )
        )

    def _is_known(self, given: bytes) -> bool:
        # All are compared, so that the time taken says nothing about which one is nearly right.
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0


def _host(request: HTTPConnection) -> str:
    host = request.headers.get("host", "").lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rsplit(":", 1)[0]


def given_key(request: HTTPConnection) -> bytes:
    """The key that a request shows; empty: none."""
    if key := request.headers.get("x-api-key"):  # as Anthropic's clients send it
        return key.strip().encode()
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
