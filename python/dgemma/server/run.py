"""Runs the application until it is told to stop."""

from __future__ import annotations

import signal
import socket
import sys

import uvicorn

from ..model import DiffusionGemma
from .app import create_app
from .connection import Connection
from .engine import Settings
from .local import LocalEngine

LOOPBACK = frozenset(["127.0.0.1", "localhost", "[::1]"])
MAX_CONNECTIONS = 512  # further ones are answered 503 at once
SHUTDOWN_SECONDS = 3  # answers under way may finish in that time; then they are cancelled


class _Server(uvicorn.Server):
    """Says where it listens once it does: with port 0 nobody knows before."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in getattr(self, "servers", []):
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                print(f"dgemma: http://{shown}:{port}", file=sys.stderr, flush=True)


def serve(
    llm: DiffusionGemma,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: str | None = None,
    max_queue: int = 256,
    alias: str | None = None,
) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code."""
    local = host in ("127.0.0.1", "localhost", "::1")
    settings = Settings(
        api_keys=frozenset() if api_key is None else frozenset([api_key]),
        hosts=LOOPBACK if local else None,
    )
    app = create_app(LocalEngine(llm, name=alias, max_queue=max_queue), settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        limit_concurrency=MAX_CONNECTIONS,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    # uvicorn ends gracefully and then raises the signal again; that must not end us with an error.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = _Server(config)
    server.run()
    return 0 if server.started else 1
