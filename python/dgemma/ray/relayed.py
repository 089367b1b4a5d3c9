"""What travels between the gateway and a replica, and what makes a broken answer whole again."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

from ..server.body import parse_json
from ..server.failures import BadRequestError
from ..server.inprocess import HttpRequest
from .prefixes import prefix_keys

# A seed is a field of these; a repeated answer is the same text only with one.
_SEEDED = ("/chat/completions", "/completions", "/completion")
# Comments and drafts: a client may see them twice.
_UNCOUNTED = (b":", b"event: draft")
Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class RelayedRequest:
    """A request on its way to a replica."""

    http: HttpRequest
    keys: list[str] = field(default_factory=list)
    """Of its conversation (`prefixes.prefix_keys`); none: any replica will do."""
    replica: str | None = None
    """The one that must answer."""

    @classmethod
    def of(cls, http: HttpRequest, *, seeded: bool) -> RelayedRequest:
        """`seeded`: an answer that is streamed gets a seed, so that it can be made again."""
        if http.method != "POST":
            return cls(http)
        if seeded and http.path.endswith(_SEEDED):
            http = _with_seed(http)
        return cls(http, prefix_keys(http.body))


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer; the bytes of its body follow."""

    status: int
    headers: list[Header]


def _with_seed(http: HttpRequest) -> HttpRequest:
    try:
        asked = parse_json(http.body)
    except BadRequestError:  # the replica says so
        return http
    if not isinstance(asked, dict) or asked.get("stream") is not True:
        return http
    if asked.get("seed") not in (None, -1):
        return http
    # Behind what is there, the last of a name counts: megabytes need not be written again.
    seed = f',"seed":{secrets.randbelow(2**31)}}}'
    return replace(http, body=http.body.rstrip()[:-1] + seed.encode())


class EventLog:
    """The events of a stream that a client has, so that another replica can go on behind them.

    With its seed an answer is the same text whichever replica makes it: the first events of the
    second attempt are those that were sent already. They are left out, and later ones get the id
    and the time of the first attempt.
    """

    def __init__(self) -> None:
        self._sent = 0
        self._to_skip = 0
        self._rest = b""
        self._head: dict[str, Any] = {}

    def restart(self) -> None:
        """An attempt has failed; what it sent is not sent again by the next one."""
        self._to_skip, self._rest = self._sent, b""

    def feed(self, data: bytes) -> bytes:
        """What of an attempt's bytes the client is to get."""
        blocks = (self._rest + data).split(b"\n\n")
        self._rest = blocks.pop()
        return b"".join(self._take(block) + b"\n\n" for block in blocks if self._wanted(block))

    def flush(self) -> bytes:
        """What is left where the answer is no stream of events, or ends within one."""
        rest, self._rest = self._rest, b""
        return rest

    def _wanted(self, block: bytes) -> bool:
        if block.startswith(_UNCOUNTED):
            return True
        if self._to_skip:
            self._to_skip -= 1
            return False
        return True

    def _take(self, block: bytes) -> bytes:
        if block.startswith(_UNCOUNTED):
            return block
        self._sent += 1
        if not block.startswith(b"data: {"):
            return block
        event = json.loads(block[6:])
        own = {name: event[name] for name in ("id", "created") if name in event}
        if not self._head:
            self._head = own
        if own == self._head or not own:
            return block
        data = json.dumps({**event, **self._head}, ensure_ascii=False, separators=(",", ":"))
        return b"data: " + data.encode()
