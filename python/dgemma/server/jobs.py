"""One answer at a time, a fair queue in front of it, and no work for clients that have gone."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator

from ..errors import CancelledError
from .engine import Event, Progress, QueueFullError

# Drafts that a slow reader has not taken yet; further ones are left out, text never is.
MAX_DRAFTS_WAITING = 32
MAX_RETRY_SECONDS = 60

log = logging.getLogger("dgemma.server")


class Job:
    """One request's answers, made by the worker and read by the request that asked for them.

    `make` gives the events and is run by the worker; `cancel_work` ends it from another thread.
    """

    def __init__(
        self,
        make: Callable[[Progress], Iterator[Event]],
        cancel_work: Callable[[], None],
        client: str,
    ) -> None:
        self.client, self.progress = client, Progress()
        self._make, self._cancel_work = make, cancel_work
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | _End] = asyncio.Queue()
        self._state = threading.Lock()
        self._running = self._cancelled = False

    def run(self) -> None:
        """Makes the answers; called by the worker."""
        with self._state:
            self._running = not self._cancelled
        problem: BaseException | None = None
        try:
            if self._running:
                self._pass_on(self._make(self.progress))
        except Exception as failure:
            problem = failure
        finally:
            with self._state:
                self._running = False
            self._put(_End(problem))

    def _pass_on(self, events: Iterator[Event]) -> None:
        try:
            for event in events:
                if self._cancelled:
                    break
                if event.name != "draft" or self._events.qsize() < MAX_DRAFTS_WAITING:
                    self._put(event)
        finally:
            with self._state:
                self._running = False
            close = getattr(events, "close", None)
            if close is not None:
                close()

    def _put(self, event: Event | _End) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the server's loop is over: nobody reads any more
            self._cancelled = True

    def cancel(self) -> None:
        """Ends the answer within one denoising step; no other answer is touched."""
        with self._state:
            self._cancelled = True
            if self._running:
                self._cancel_work()

    async def events(self) -> AsyncIterator[Event]:
        """Events as they are made; raises what making them raised."""
        while True:
            event = await self._events.get()
            if not isinstance(event, _End):
                yield event
                continue
            gone = isinstance(event.problem, CancelledError) and self._cancelled
            if event.problem is not None and not gone:
                raise event.problem
            return


class _End:
    def __init__(self, problem: BaseException | None) -> None:
        self.problem = problem


class FairQueue:
    """Jobs of several clients: each client in turn, and a client's own in their order."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, job: Job) -> int:
        """Adds a job; returns how many of those that wait come before it."""
        own = self._waiting.setdefault(job.client, deque())
        own.append(job)
        place = len(own) - 1
        return sum(min(len(jobs), place) for jobs in self._waiting.values()) + sum(
            len(jobs) > place for jobs in self._before(job.client)
        )

    def _before(self, client: str) -> Iterator[deque[Job]]:
        for name, jobs in self._waiting.items():
            if name == client:
                return
            yield jobs

    def take(self) -> Job:
        """The next job; IndexError where none waits."""
        if not self._waiting:
            raise IndexError("the queue is empty")
        client, jobs = next(iter(self._waiting.items()))
        job = jobs.popleft()
        self._waiting.move_to_end(client)
        if not jobs:
            del self._waiting[client]
        return job

    def discard(self, job: Job) -> bool:
        """Takes a job out that nobody waits for any more; whether it was there."""
        jobs = self._waiting.get(job.client)
        if jobs is None or job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.client]
        return True

    def jobs(self) -> list[Job]:
        """Those that wait."""
        return [job for jobs in self._waiting.values() for job in jobs]


class Worker:
    """The thread that makes answers, and the queue in front of it."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._state = threading.Condition()
        self._queue = FairQueue()
        self._current: Job | None = None
        self._seconds = 1.0  # that an answer takes, the last ones weighing most
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="dgemma-worker", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def n_live(self) -> int:
        """Requests under way and waiting."""
        return len(self._queue) + (self._current is not None)

    def submit(self, job: Job) -> None:
        """Puts a job into the queue; QueueFullError where there is no room."""
        with self._state:
            n_live = self.n_live
            if self._closed or n_live > self._max_queue:
                raise QueueFullError(
                    f"the queue is full: one answer is under way and {self._max_queue} wait",
                    retry_after=self._retry_after(n_live),
                )
            job.progress.ahead = self._queue.put(job) + (self._current is not None)
            self._state.notify()
        if job.progress.ahead:
            log.info("a request of %s waits behind %d", job.client, job.progress.ahead)

    def _retry_after(self, n_live: int) -> int:
        """Seconds after which half of what waits is likely to be done."""
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(self._seconds * n_live / 2)))

    def cancel(self, job: Job) -> None:
        """Ends a job, or takes it out of the queue."""
        with self._state:
            waited = self._queue.discard(job)
        job.cancel()
        if waited:
            job.run()  # which only says that it has ended

    def _work(self) -> None:
        while True:
            with self._state:
                self._current = None
                while not len(self._queue):
                    if self._closed:
                        return
                    self._state.wait()
                job = self._current = self._queue.take()
                for waiting in self._queue.jobs():
                    waiting.progress.ahead = max(1, waiting.progress.ahead - 1)
            began = time.monotonic()
            job.run()
            self._seconds += 0.2 * (time.monotonic() - began - self._seconds)

    def close(self) -> None:
        """Cancels everything and waits for the thread."""
        with self._state:
            self._closed = True
            jobs = self._queue.jobs()
            current = self._current
            self._state.notify()
        for job in jobs:
            self.cancel(job)
        if current is not None:
            current.cancel()
        self._thread.join(timeout=60)
