"""One answer at a time, a short queue behind it, and no work for clients that have gone."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from ..errors import CancelledError, Error
from ..generation.generate import Answer, Draft

# Drafts that a slow reader has not taken yet; further ones are left out, text never is.
MAX_DRAFTS_WAITING = 32


class QueueFullError(Error):
    """No more requests may wait."""


class Job:
    """One answer, made by the worker and read by the request that asked for it."""

    def __init__(self, answer: Answer, events: Iterator[Any], cancel: Callable[[], None]) -> None:
        self.answer = answer
        self._iterate, self._cancel_session = events, cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._state = threading.Lock()
        self._running = self._cancelled = False

    def run(self) -> None:
        """Makes the answer; called by the worker."""
        with self._state:
            self._running = not self._cancelled
        problem: BaseException | None = None
        try:
            if self._running:
                for event in self._iterate:
                    if self._cancelled:
                        break
                    if not isinstance(event, Draft) or self._events.qsize() < MAX_DRAFTS_WAITING:
                        self._put(event)
        except Exception as failure:
            problem = failure
        finally:
            with self._state:
                self._running = False
            close = getattr(self._iterate, "close", None)
            if close is not None:
                close()
            self._put(_End(problem))

    def _put(self, event: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the server's loop is over: nobody reads any more
            self._cancelled = True

    def cancel(self) -> None:
        """Ends the answer within one denoising step; no other answer is touched."""
        with self._state:
            self._cancelled = True
            if self._running:
                self._cancel_session()

    async def events(self) -> AsyncIterator[Any]:
        """Drafts and chunks as they are made; raises what making them raised."""
        while True:
            event = await self._events.get()
            if isinstance(event, _End):
                if event.problem is not None and not isinstance(event.problem, CancelledError):
                    raise event.problem
                if isinstance(event.problem, CancelledError) and not self._cancelled:
                    raise event.problem
                return
            yield event


class _End:
    def __init__(self, problem: BaseException | None) -> None:
        self.problem = problem


class Worker:
    """The thread that makes answers, and the queue in front of it."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._live: set[Job] = set()  # running and waiting
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="dgemma-worker", daemon=True)
        self._thread.start()

    @property
    def n_live(self) -> int:
        """Answers under way and waiting."""
        return len(self._live)

    def submit(self, job: Job) -> None:
        """Puts a job into the queue; QueueFullError where there is no room."""
        with self._lock:
            if self._closed or len(self._live) > self._max_queue:
                raise QueueFullError(
                    f"the queue is full: one answer is under way and {self._max_queue} wait"
                )
            self._live.add(job)
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.run()
            finally:
                with self._lock:
                    self._live.discard(job)

    def close(self) -> None:
        """Cancels everything and waits for the thread."""
        with self._lock:
            self._closed = True
            jobs = list(self._live)
        for job in jobs:
            job.cancel()
        self._jobs.put(None)
        self._thread.join(timeout=60)
