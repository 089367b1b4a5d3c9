"""uvicorn's HTTP connections, which by themselves wait for ever for a client that does nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0  # from connecting, or from its first byte, until a request's head is there
STALLED_SECONDS = 60.0  # without a client taking anything of what waits for it
SEND_BUFFER = 128 * 1024  # bytes that the system may hold for one client


class Connection(H11Protocol):
    """Ends connections that hold up: half-sent heads, and readers that have stopped reading."""

    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_SECONDS, transport.abort)
        connected = transport.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        # An answer's body would wait for the client's receipt of its head, 40 ms: asyncio sets this
        # by itself only for sockets that name their protocol.
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request's head or body."""
        super().data_received(data)
        in_request = self.cycle is not None and not self.cycle.response_complete
        if in_request:
            self._end_head_timer()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """The client takes less than is written."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._end_stalled_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._end_head_timer()
        self._end_stalled_timer()
        super().connection_lost(exc)

    def _end_head_timer(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _end_stalled_timer(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
