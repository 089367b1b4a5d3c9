"""Which conversations a replica has seen: requests with a known beginning go back to it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..server.body import parse_json
from ..server.failures import BadRequestError

CAPACITY = 100_000
"""Beginnings that are remembered; the one that was not used for longest goes first."""
MAX_IMBALANCE = 4
"""Requests that a replica may have more than the least loaded one before a prefix is given up."""
TEXT_PIECE = 512
"""Characters of a plain prompt that count as one message."""


def prefix_keys(body: bytes) -> list[str]:
    """Hashes of ever longer beginnings of a request's conversation, shortest first.

    What stands before the first message of a user (system messages, tools) is part of every key but
    is none by itself: conversations of one application share it. Empty where there is nothing that
    a later request could continue.
    """
    try:
        asked = parse_json(body)  # within the bounds of the server's own
    except BadRequestError:
        return []
    if not isinstance(asked, dict):
        return []
    messages = asked.get("messages", asked.get("input"))
    if isinstance(messages, list):
        before = [asked.get("system"), asked.get("instructions"), asked.get("tools")]
        return _keys(before, messages)
    prompt = messages if isinstance(messages, str) else asked.get("prompt")
    if isinstance(prompt, str):
        pieces = range(0, len(prompt) - TEXT_PIECE + 1, TEXT_PIECE)
        return _keys([], [prompt[i : i + TEXT_PIECE] for i in pieces])
    return []


def _keys(before: Sequence[Any], messages: Iterable[Any]) -> list[str]:
    digest = hashlib.blake2b(_canonical(before), digest_size=12)
    keys, started = [], False
    for message in messages:
        digest.update(_canonical(message))
        role = message.get("role") if isinstance(message, dict) else "user"
        started = started or role not in ("system", "developer")
        if started:
            keys.append(digest.hexdigest())
    return keys


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


class PrefixMap:
    """The replica that saw a beginning last, for as many beginnings as there is room."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._replicas: OrderedDict[str, str] = OrderedDict()
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._replicas)

    def held(self, replica: str) -> int:
        """Beginnings that a replica has."""
        return self._held[replica]

    def longest(self, keys: Sequence[str], alive: Container[str]) -> str | None:
        """The replica with the longest of these beginnings, among those that are alive."""
        for key in reversed(keys):
            replica = self._replicas.get(key)
            if replica is not None and replica in alive:
                return replica
        return None

    def remember(self, keys: Iterable[str], replica: str) -> None:
        """Notes where a request went."""
        for key in keys:
            before = self._replicas.pop(key, None)
            if before is not None:
                self._held[before] -= 1
            self._replicas[key] = replica
            self._held[replica] += 1
        while len(self._replicas) > self._capacity:
            self._held[self._replicas.popitem(last=False)[1]] -= 1


@dataclass
class RoutingState:
    """What the routers of this process know; read by the gateway for its metrics."""

    prefixes: PrefixMap = field(default_factory=PrefixMap)
    replicas: set[str] = field(default_factory=set)
    routed: int = 0
    """Requests that have a conversation."""
    hits: int = 0
    """Of these, sent to the replica that holds their prefix."""

    def choose(self, keys: Sequence[str], loads: Mapping[str, int]) -> str | None:
        """The replica for a conversation; `loads`: requests that each has and waits for.

        The one that holds its longest prefix, unless others have much less to do; else the least
        loaded, and of these the one with the fewest conversations. None without replicas.
        """
        if not loads:
            return None
        lowest = min(loads.values())
        known = self.prefixes.longest(keys, loads)
        if known is not None and loads[known] - lowest <= MAX_IMBALANCE:
            return known
        return min(loads, key=lambda name: (loads[name], self.prefixes.held(name), name))

    def routed_to(self, replica: str, keys: Sequence[str]) -> None:
        """Notes where a conversation went."""
        self.routed += 1
        self.hits += self.prefixes.longest(keys, self.replicas) == replica
        self.prefixes.remember(keys, replica)


STATE = RoutingState()
