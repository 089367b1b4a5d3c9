"""Connections of the server, without a server."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from dgemma.server.connection import Connection


def test_an_answer_does_not_wait_for_the_receipt_of_its_head() -> None:
    """Also on sockets that `socket.create_server` makes, whose protocol asyncio does not see."""

    async def connected() -> int:
        config = uvicorn.Config(lambda *_: None, http=Connection)
        config.load()
        state = uvicorn.server.ServerState()
        made: list[Connection] = []

        def connection() -> Connection:
            made.append(Connection(config=config, server_state=state, app_state={}))
            return made[-1]

        listening = socket.create_server(("127.0.0.1", 0))
        loop = asyncio.get_running_loop()
        server = await loop.create_server(connection, sock=listening)
        _, writer = await asyncio.open_connection(*listening.getsockname())
        while not made or made[-1].transport is None:
            await asyncio.sleep(0.001)
        accepted = made[-1].transport.get_extra_info("socket")
        found = int(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()
        server.close()
        return found

    assert asyncio.run(connected()) != 0
