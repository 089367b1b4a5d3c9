"""A batch over the workers of a cluster, through Ray Data."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import ray
import ray.data

from ..batch.records import Line, Record
from ..batch.run import Answerer, answer_line
from .deployments import Settings

MAX_PIECE = 32
"""Requests that a worker gets at a time, at most: what is made again where one is lost."""
WINDOW = 50_000
"""Requests that are handed to the cluster at a time, however many the batch has."""


class _Worker:
    """One model on a worker; Ray Data keeps it for all pieces of a window."""

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.new_event_loop()
        self._app = settings.app(settings.open())
        self._lifespan = self._app.router.lifespan_context(self._app)
        self._loop.run_until_complete(self._lifespan.__aenter__())

    def __call__(self, piece: dict[str, Any]) -> dict[str, list[Any]]:
        lines = [Line(**json.loads(line)) for line in piece["line"]]
        records = [self._loop.run_until_complete(answer_line(self._app, one)) for one in lines]
        # As texts: Arrow's types want all records alike.
        return {
            "number": [one.number for one in lines],
            "record": [json.dumps(record) for record in records],
        }


def on_cluster(settings: Settings, *, workers: int | tuple[int, int]) -> Answerer:
    """Answers with `workers` models of a connected cluster, or from so many up to so many.

    A worker that is lost is replaced and its piece made again; each answer leaves the cluster once.
    """

    def answer(lines: Iterator[Line]) -> Iterator[tuple[int, Record]]:
        while window := list(islice(lines, WINDOW)):
            yield from _answer(settings, workers, window)

    return answer


def _answer(
    settings: Settings, workers: int | tuple[int, int], window: list[Line]
) -> Iterator[tuple[int, Record]]:
    low, high = workers if isinstance(workers, tuple) else (workers, workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"line": json.dumps(asdict(line))} for line in window]
    # Handing a piece over takes a tenth of a second; eight for each worker keep all at work.
    piece = max(1, min(MAX_PIECE, len(items) // (8 * high)))
    blocks = -(-len(items) // piece)
    made = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        _Worker,
        batch_size=piece,
        compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
        fn_constructor_args=(settings,),
        **settings.resources(),
    )
    for row in made.iter_rows():
        yield int(row["number"]), json.loads(row["record"])
