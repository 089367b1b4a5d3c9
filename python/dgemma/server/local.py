"""The engine that has its model in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ..compat.chat import ChatCompletion
from ..compat.completions import Completion
from ..compat.requests import ChatOptions, CompletionOptions, accept
from ..errors import CancelledError
from ..generation.events import Draft
from ..model import DiffusionGemma
from .engine import Ask, Card, Event, JsonObject, Progress, QueueFullError
from .jobs import Job, Worker
from .metrics import Metrics

# Templates and encodings run here. More threads would make the event loop wait for its turn with
# the interpreter, and one would let a long prompt hold up the others.
N_PREPARING = 2

T = TypeVar("T")
Made = ChatCompletion | Completion


class LocalEngine:
    """Answers from a model, one at a time; `max_queue` requests may wait."""

    def __init__(
        self, llm: DiffusionGemma, *, name: str | None = None, max_queue: int = 256
    ) -> None:
        self._llm = llm
        self.card = card(llm, name or Path(llm.model_path).stem)
        self._metrics = Metrics()
        self._worker = Worker(max_queue)
        self._preparing = ThreadPoolExecutor(N_PREPARING, "dgemma-prepare")

    async def open(self, ask: Ask) -> OpenedAnswer:
        """See `Engine`."""
        made, opening, chunks = await self._prepared(lambda: self._make(ask))
        opened = OpenedAnswer(self._worker, self._metrics, made, opening, self._llm.cancel)
        opened.job = Job(lambda job: self._events(job, made, chunks, ask), opened.stop, ask.client)
        try:
            self._worker.submit(opened.job)
        except QueueFullError:
            self._metrics.count("requests_refused")
            raise
        return opened

    async def _prepared(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    def _make(self, ask: Ask) -> tuple[Made, list[JsonObject], Generator[Any, None, None] | None]:
        kind = ChatOptions if ask.kind == "chat" else CompletionOptions
        accepted = accept(ask.options, kind, unknown="ignore", also=("messages", "prompt"))
        options = {**accepted.options, "model": self.card.name, "warnings": accepted.warnings}
        options.pop("stream_options", None)  # the routes' business
        made: Made
        if ask.kind == "chat":
            made = ChatCompletion(self._llm, options.pop("messages"), **options)
        else:
            made = Completion(self._llm, options.pop("prompt"), **options)
        if not ask.stream:
            return made, [], None
        chunks = made.events()
        # A conversation's first chunk says who speaks, and needs no model.
        opening = [next(chunks)] if ask.kind == "chat" else []
        return made, opening, chunks  # type: ignore[return-value]

    def _events(
        self, job: Job, made: Made, chunks: Generator[Any, None, None] | None, ask: Ask
    ) -> Iterator[Event]:
        job.progress.state = "reading"
        if chunks is None:
            yield Event("chunk", made.whole())
        else:
            with contextlib.closing(chunks):
                for event in chunks:
                    job.progress.state = "writing"
                    if not isinstance(event, Draft):
                        yield Event("chunk", event)
                    elif ask.drafts:
                        yield Event("draft", draft_json(self._llm, event))
        stats = [vars(answer.stats) for answer in made.choices.answers]
        yield Event("end", {"usage": made.usage(), "stats": stats})

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
        return await self._prepared(lambda: self._llm.chat_template.render(messages, **options))

    def slots(self) -> list[JsonObject]:
        """See `Engine`."""
        busy = self._worker.n_live > self._worker.n_waiting
        return [{"id": 0, "n_ctx": self.card.n_ctx, "is_processing": busy}]

    def metrics(self) -> str:
        """See `Engine`."""
        worker = self._worker
        return self._metrics.text(
            {"requests_live": worker.n_live, "requests_waiting": worker.n_waiting}
        )

    async def close(self) -> None:
        """See `Engine`."""
        await asyncio.get_running_loop().run_in_executor(None, self._worker.close)
        self._preparing.shutdown(wait=False, cancel_futures=True)


class OpenedAnswer:
    """A request in the queue of a `LocalEngine`; see `Opened`."""

    job: Job

    def __init__(
        self,
        worker: Worker,
        metrics: Metrics,
        made: Made,
        opening: Sequence[JsonObject],
        stop: Callable[[], None],
    ) -> None:
        self._worker, self._metrics, self._made = worker, metrics, made
        self.opening, self.stop = opening, stop
        self.warnings: Sequence[str] = made.warnings

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
            self._metrics.add([answer.stats for answer in self._made.choices.answers])

    def cancel(self) -> None:
        """See `Opened`."""
        self._worker.cancel(self.job)


def card(llm: DiffusionGemma, name: str) -> Card:
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
