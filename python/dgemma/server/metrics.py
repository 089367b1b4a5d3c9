"""Counters in Prometheus' text form."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import TypeVar

from ..generation.generate import Answer

T = TypeVar("T")

_HELP = {
    "requests": "Answers that were begun.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were encoded already.",
    "completion_tokens": "Tokens of answers.",
    "canvases": "Canvases that were denoised.",
    "denoising_steps": "Denoising steps.",
    "generation_seconds": "Time spent on answers, their prompts included.",
}


class Metrics:
    """What all answers together took; used from the event loop only."""

    def __init__(self) -> None:
        self._total: Counter[str] = Counter()

    async def counted(self, events: AsyncIterator[T], answer: Answer) -> AsyncIterator[T]:
        """Passes the events of an answer on, and counts it when they end in whatever way."""
        try:
            async for event in events:
                yield event
        finally:
            stats = answer.stats
            self._total.update(
                requests=1,
                prompt_tokens=stats.prompt_tokens,
                cached_tokens=stats.cached_tokens,
                completion_tokens=stats.completion_tokens,
                canvases=stats.canvases,
                denoising_steps=sum(stats.steps),
            )
            # Counter counts numbers of any kind; its type only knows whole ones.
            self._total["generation_seconds"] += stats.timings.get("total_s", 0.0)  # type: ignore[assignment]

    def text(self, n_live: int) -> str:
        """The page that Prometheus reads."""
        lines = []
        for name, help in _HELP.items():
            full = f"dgemma_{name}_total"
            lines += [f"# HELP {full} {help}", f"# TYPE {full} counter"]
            lines.append(f"{full} {self._total[name]}")
        lines += [
            "# HELP dgemma_requests_live Answers under way and waiting.",
            "# TYPE dgemma_requests_live gauge",
            f"dgemma_requests_live {n_live}",
        ]
        return "\n".join(lines) + "\n"
