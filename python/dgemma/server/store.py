"""Answers of the responses API that are kept, so that a client may go on from them by their id."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .engine import JsonObject

_VALUE_BYTES = 64  # that a value takes besides its text, roughly


@dataclass(frozen=True)
class Kept:
    """A response: what was new in its request, and what was answered.

    `owner`: who may ask for it. `before`: the response that it goes on from.
    """

    owner: str
    response: JsonObject
    items: Sequence[JsonObject]
    before: str | None
    n_bytes: int


class ResponseStore:
    """The last responses that fit `max_bytes`, by their ids; 0 keeps none.

    The one that was not used for longest goes first. Whoever goes on from a response uses those
    before it, their beginning last: so a conversation is dropped from its end, and nothing is kept
    that nobody can go on from.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._holders: dict[str, str] = {}  # the response of each item
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def n_bytes(self) -> int:
        """What they take, roughly."""
        return self._n_bytes

    def add(
        self, owner: str, response: JsonObject, items: Sequence[JsonObject], before: str | None
    ) -> None:
        """Keeps a response, and drops others where there is no room."""
        n_bytes = _size(response) + _size(items)
        with self._lock:
            if n_bytes > self._max_bytes:
                return
            self._kept[response["id"]] = Kept(owner, response, items, before, n_bytes)
            self._n_bytes += n_bytes
            self._use(self._chain(owner, response["id"]))
            for item in (*items, *response["output"]):
                if isinstance(id := item.get("id"), str):
                    self._holders[id] = response["id"]
            while self._n_bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))

    def get(self, owner: str, id: str) -> Kept | None:
        """A response of this owner."""
        kept = self._kept.get(id)
        return kept if kept is not None and kept.owner == owner else None

    def delete(self, owner: str, id: str) -> bool:
        """Forgets a response; whether there was one."""
        with self._lock:
            if self.get(owner, id) is None:
                return False
            self._drop(id)
            return True

    def conversation(self, owner: str, id: str) -> list[JsonObject] | None:
        """All items up to the end of a response; None where one of them is gone."""
        with self._lock:
            chain = self._chain(owner, id)
            if not chain or chain[-1].before is not None:
                return None
            self._use(chain)
        return [
            item for kept in reversed(chain) for item in (*kept.items, *kept.response["output"])
        ]

    def _chain(self, owner: str, id: str) -> list[Kept]:
        """A response and those before it, as far as they are there; the last one first."""
        chain: list[Kept] = []
        at: str | None = id
        while at is not None and (kept := self.get(owner, at)) is not None:
            chain.append(kept)
            at = kept.before
        return chain

    def _use(self, chain: Sequence[Kept]) -> None:
        for kept in chain:
            self._kept.move_to_end(kept.response["id"])

    def item(self, owner: str, id: str) -> JsonObject | None:
        """An item of any response of this owner."""
        kept = self.get(owner, self._holders.get(id, ""))
        if kept is None:
            return None
        items = (*kept.items, *kept.response["output"])
        return next((item for item in items if item.get("id") == id), None)

    def _drop(self, id: str) -> None:
        kept = self._kept.pop(id)
        self._n_bytes -= kept.n_bytes
        for item in (*kept.items, *kept.response["output"]):
            if self._holders.get(str(item.get("id"))) == id:
                del self._holders[item["id"]]


@dataclass(frozen=True)
class OwnPast:
    """What one owner may know of a store; see `dialects.responses.Past`."""

    store: ResponseStore
    owner: str

    def conversation(self, id: str) -> list[JsonObject] | None:
        """See `ResponseStore`."""
        return self.store.conversation(self.owner, id)

    def item(self, id: str) -> JsonObject | None:
        """See `ResponseStore`."""
        return self.store.item(self.owner, id)


def _size(value: Any) -> int:
    """Roughly what a value takes in memory."""
    total, pending = 0, [value]
    while pending:
        item = pending.pop()
        total += _VALUE_BYTES
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += sum(map(len, item))
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
    return total
