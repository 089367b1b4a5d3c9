"""Runs the application until it is told to stop."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn

from ..model import DiffusionGemma
from .app import create_app
from .connection import Connection
from .engine import Settings
from .local import LocalEngine

LOOPBACK = frozenset(["127.0.0.1", "localhost", "[::1]"])
# How a container calls the machine it runs on.
CONTAINER_HOST = "host.docker.internal"
MAX_CONNECTIONS = 1024  # further ones are answered 503 at once
SHUTDOWN_SECONDS = 3  # answers under way may finish in that time; then they are cancelled

log = logging.getLogger("dgemma.server")


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
    api_keys: Sequence[str] = (),
    max_queue: int = 256,
    alias: str | None = None,
    n_sessions: int | None = None,
    session_bytes: int | None = None,
    allowed_hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    strict: bool = False,
) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code. The options are the command's."""
    log_to_stderr()
    settings = Settings(
        api_keys=frozenset(api_keys),
        hosts=served_names(host, allowed_hosts),
        origins=tuple(origins),
        strict=strict,
    )
    socket_ = listening(host, port)
    warn_if_open(host, api_keys)
    engine = LocalEngine(
        llm,
        name=alias,
        max_queue=max_queue,
        n_sessions=n_sessions,
        session_bytes=session_bytes,
    )
    config = uvicorn.Config(
        create_app(engine, settings),
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
    server.run(sockets=[socket_])
    return 0 if server.started else 1


def warn_if_open(host: str, api_keys: Sequence[str]) -> None:
    """Says so where the network may use the model without a key."""
    if not is_local(host) and not api_keys:
        log.warning(
            "%s is open to the network without a key: anyone who reaches this machine may use the "
            "model. --api-key-file FILE asks for one",
            host,
        )


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in ("localhost", "::1") or host.startswith("127.")


def served_names(host: str, allowed: Sequence[str]) -> frozenset[str] | None:
    """The names that the server answers to; None: to any.

    On loopback, so that no page of another site can reach it through a name of its own, those of
    this machine. Elsewhere any, unless some are named.
    """
    names = frozenset(name.strip().lower() for name in allowed)
    if "*" in names or (not names and not is_local(host)):
        return None
    own = frozenset([f"[{host}]" if ":" in host else host.lower()])
    return LOOPBACK | own | names | {CONTAINER_HOST}


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; OSError in one line where that fails."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port}: expected 0 (any) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as problem:
        raise OSError(f"cannot listen on {host}:{port}: {problem}") from problem
    found.setblocking(False)
    return found


def log_to_stderr() -> None:
    """What the server has to say goes to standard error, a line each, after the program's name."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("dgemma: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
