"""Answers a batch in this process, or with workers that somebody else brings along."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .journal import Journal
from .records import Line, Record, answered, failed, read_lines, refused

if TYPE_CHECKING:
    from ..model import DiffusionGemma

Answerer = Callable[[Iterator[Line]], Iterable[tuple[int, Record]]]
"""Takes requests, gives back each one's line number and record, in any order."""


@dataclass
class Report:
    """What came of a batch."""

    file: str
    requests: int
    """Lines of the input."""
    resumed: int
    """Of these, answered by an earlier run."""
    failed: int
    """Of these, answered with an error."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as a dictionary."""
        return asdict(self)


def run_batch(
    source: Path,
    output: Path,
    answer: Answerer,
    *,
    ordered: bool = True,
    retry_failed: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> Report:
    """Answers every line of `source` and writes `output`: one line out for each line in.

    Where it ends early, by Ctrl-C or a crash, the next call goes on behind the last line that was
    answered. `progress` is told answered lines, failed ones and all.

    Errors: BatchError, OSError, and what `answer` raises.
    """
    began = time.perf_counter()
    n_lines = sum(1 for _ in read_lines(source))
    with Journal(output, source, retry_failed=retry_failed) as journal:
        resumed = len(journal)

        def show() -> None:
            if progress is not None:
                progress(len(journal), journal.n_failed, n_lines)

        def pending() -> Iterator[Line]:
            for line in read_lines(source):
                if line.number in journal:
                    continue
                if line.problem is None:
                    yield line
                else:
                    journal.append(line.number, refused(line))
                    show()

        show()
        for number, record in answer(pending()):
            journal.append(number, record)
            show()
        n_failed = journal.n_failed
        journal.finish(ordered=ordered)
    seconds = time.perf_counter() - began
    return Report(str(output), n_lines, resumed, n_failed, seconds)


async def answer_line(app: Any, line: Line) -> Record:
    """The record of one request, made by the server's routes; never raises for a bad request."""
    from ..server.inprocess import answer

    try:
        status, body = await answer(app, line.request())
    except Exception as problem:
        return failed(line, "server_error", str(problem) or type(problem).__name__)
    return answered(line, status, body)


def in_this_process(llm: DiffusionGemma, *, alias: str) -> Answerer:
    """Answers one request after another with a model that is open here."""
    from ..server.app import create_app
    from ..server.local import LocalEngine

    def answer(lines: Iterator[Line]) -> Iterator[tuple[int, Record]]:
        app = create_app(LocalEngine(llm, name=alias))
        loop = asyncio.new_event_loop()
        lifespan = app.router.lifespan_context(app)
        loop.run_until_complete(lifespan.__aenter__())
        try:
            for line in lines:
                yield line.number, loop.run_until_complete(answer_line(app, line))
        finally:
            loop.run_until_complete(lifespan.__aexit__(None, None, None))
            loop.close()

    return answer
