"""The engine that has its model in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from .._native import Session
from ..compat.chat import ChatCompletion
from ..compat.completions import Completion
from ..errors import CancelledError
from ..generation.events import Draft, Stats
from ..generation.sessions import SessionPool, sessions_within
from ..model import DiffusionGemma
from .engine import Ask, Card, Event, JsonObject, Progress, QueueFullError
from .jobs import Job, Worker
from .metrics import Metrics

# Templates and encodings run here. More threads would make the event loop wait for its turn with
# the interpreter, and one would let a long prompt hold up the others.
N_PREPARING = 2
MAX_SESSIONS = 8

T = TypeVar("T")


class LocalEngine:
    """Answers from a model, one at a time.

    `max_queue` requests may wait. The beginnings of `n_sessions` conversations are kept; without a
    number as many as fit `session_bytes`, or a tenth of the machine's memory, and at most
    MAX_SESSIONS.
    """

    def __init__(
        self,
        llm: DiffusionGemma,
        *,
        name: str | None = None,
        max_queue: int = 256,
        n_sessions: int | None = None,
        session_bytes: int | None = None,
    ) -> None:
        self._llm = llm
        if n_sessions is None:
            budget = machine_bytes() // 10 if session_bytes is None else session_bytes
            n_sessions = min(MAX_SESSIONS, sessions_within(budget, llm.memory()))
        self._pool = SessionPool(llm.default_session, llm.session, n_sessions)
        self.card = card(llm, name or Path(llm.model_path).stem, n_sessions)
        self._metrics = Metrics()
        self._worker = Worker(max_queue)
        self._preparing = ThreadPoolExecutor(N_PREPARING, "dgemma-prepare")

    async def open(self, ask: Ask) -> OpenedAnswer:
        """See `Engine`."""
        work = await self._prepared(lambda: _Work(self._llm, self._pool, ask, self.card.name))
        opened = OpenedAnswer(self._worker, self._metrics, work, ask.client)
        try:
            self._worker.submit(opened.job)
        except QueueFullError:
            self._metrics.count("requests_refused")
            raise
        return opened

    async def _prepared(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """See `Engine`."""
        return await self._prepared(
            lambda: self._llm.tokenize(text, add_bos=add_special, special=parse_special)
        )

    async def detokenize(self, tokens: Sequence[int]) -> list[bytes]:
        """See `Engine`."""
        tokenizer = self._llm.tokenizer
        return await self._prepared(
            lambda: [tokenizer.token_bytes(token, special=True) for token in tokens]
        )

    async def render(self, messages: Sequence[Any], **options: Any) -> str:
        """See `Engine`."""
        return await self._prepared(lambda: _rendered(self._llm, messages, options))

    async def count(self, messages: Sequence[Any], **options: Any) -> int:
        """See `Engine`."""
        llm = self._llm
        return await self._prepared(
            lambda: len(llm.encode_prompt(_rendered(llm, messages, options)))
        )

    def slots(self) -> list[JsonObject]:
        """See `Engine`."""
        n_ctx = self.card.n_ctx
        return [
            {"id": s.id, "n_ctx": n_ctx, "is_processing": s.busy, "n_past": len(s.tokens)}
            for s in self._pool.slots
        ]

    def metrics(self) -> str:
        """See `Engine`."""
        slots = self._pool.slots
        gauges = {
            "requests_live": self._worker.n_live,
            "requests_waiting": self._worker.n_waiting,
            "sessions": len(slots),
            "cached_positions": sum(len(slot.tokens) for slot in slots),
        }
        return self._metrics.text(gauges)

    async def close(self) -> None:
        """See `Engine`."""
        await asyncio.get_running_loop().run_in_executor(None, self._worker.close)
        self._preparing.shutdown(wait=False, cancel_futures=True)


class _Work:
    """The answers to one request: checked and encoded here, made by the worker."""

    def __init__(self, llm: DiffusionGemma, pool: SessionPool, ask: Ask, name: str) -> None:
        self._llm, self._pool, self._ask = llm, pool, ask
        self._session: Session | None = None
        options = {**ask.options, "model": name}
        options.pop("stream_options", None)  # the routes' business
        self.made: ChatCompletion | Completion
        if ask.kind == "chat":
            messages = options.pop("messages")
            _check_length(llm, messages, options.get("tools"))
            self.made = ChatCompletion(llm, messages, **options)
        else:
            self.made = Completion(llm, options.pop("prompt"), suffix_in_text=False, **options)
        self._chunks: Generator[Any, None, None] | None = None
        self.opening: list[JsonObject] = []
        if ask.stream:
            self._chunks = self.made.events()  # type: ignore[assignment]
        if self._chunks is not None and ask.kind == "chat":
            # The first chunk of each choice says who speaks, and needs no model.
            self.opening = [next(self._chunks) for _ in self.made.choices.answers]

    @property
    def stats(self) -> list[Stats]:
        """What the answers took."""
        return [answer.stats for answer in self.made.choices.answers]

    def events(self, progress: Progress) -> Iterator[Event]:
        """Makes the answers, in the session that knows most of the prompt."""
        progress.state = "reading"
        with self._pool.held(self.made.choices.prompts[0]) as self._session:
            self.made.choices.use(self._session)
            if self._chunks is None:
                yield Event("chunk", self.made.whole())
            else:
                yield from self._streamed(self._chunks, progress)
        stats = [vars(stats) for stats in self.stats]
        yield Event("end", {"usage": self.made.usage(), "stats": stats})

    def _streamed(self, chunks: Generator[Any, None, None], progress: Progress) -> Iterator[Event]:
        with contextlib.closing(chunks):
            for event in chunks:
                progress.state = "writing"
                if not isinstance(event, Draft):
                    yield Event("chunk", event)
                elif self._ask.drafts:
                    yield Event("draft", draft_json(self._llm, event))

    def cancel(self) -> None:
        """Ends the call that works for these answers; only while `events` is read."""
        if self._session is not None:
            self._session.cancel()


class OpenedAnswer:
    """A request in the queue of a `LocalEngine`; see `Opened`."""

    def __init__(self, worker: Worker, metrics: Metrics, work: _Work, client: str) -> None:
        self._worker, self._metrics, self._work = worker, metrics, work
        self.opening, self.warnings = work.opening, work.made.warnings
        self.job = Job(work.events, work.cancel, client)

    @property
    def progress(self) -> Progress:
        """See `Opened`."""
        return self.job.progress

    async def events(self) -> AsyncIterator[Event]:
        """See `Opened`."""
        ended = False
        try:
            async for event in self.job.events():
                yield event
            ended = True
        except CancelledError:
            raise
        except Exception:
            self._metrics.count("requests_failed")
            ended = True
            raise
        finally:
            if not ended:
                self._metrics.count("requests_cancelled")
            self.cancel()
            self._metrics.add(self._work.stats)

    def cancel(self) -> None:
        """See `Opened`."""
        self._worker.cancel(self.job)


def _rendered(llm: DiffusionGemma, messages: Any, options: Mapping[str, Any]) -> str:
    _check_length(llm, messages, options.get("tools"))
    return llm.chat_template.render(messages, **options)


def _check_length(llm: DiffusionGemma, messages: Any, tools: Any) -> None:
    """Before they are rendered: what is too long would take long for that too."""
    llm.check_text_length("".join([*_texts(messages), *_descriptions(tools)]))


def _descriptions(tools: Any) -> Iterator[str]:
    """The texts in the declarations of tools, and in whatever else was sent for such."""
    pending = [tools]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _texts(messages: Any) -> Iterator[str]:
    """The texts in messages of whatever shape; those of what is no text are not looked for."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def card(llm: DiffusionGemma, name: str, n_sessions: int = 1) -> Card:
    """What a loaded model is."""
    info = {n: v for n, v in vars(llm.info).items() if n != "sampling"}
    tokens = llm.tokenizer.tokens
    bos, end = llm.tokenizer.bos, llm.info.end_tokens
    return Card(
        name=name,
        n_ctx=llm.n_ctx(),
        canvas_length=llm.info.canvas_length,
        sampling=vars(llm.sampling),
        info=info,
        file=Path(llm.model_path).name,
        chat_template=str(llm.metadata.get("tokenizer.chat_template") or ""),
        bos_token="" if bos is None else tokens[bos],
        eos_token=tokens[end[0]] if end else "",
        n_slots=n_sessions,
    )


def draft_json(llm: DiffusionGemma, draft: Draft) -> JsonObject:
    """A draft as clients see it: one text per token up to the first end token."""
    decoder, n = llm.tokenizer.decoder(), draft.end
    return {
        "canvas": draft.canvas,
        "step": draft.step,
        "tokens": draft.tokens[:n],
        "pieces": [decoder.feed(token) for token in draft.tokens[:n]],
        "entropies": [round(float(value), 4) for value in draft.entropies[:n]],
        "mean_entropy": draft.mean_entropy,
        "n_accepted": draft.n_accepted,
        "settled": draft.settled,
    }
