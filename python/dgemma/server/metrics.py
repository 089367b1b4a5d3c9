"""Counters in Prometheus' text form."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from ..generation.events import Stats

_COUNTERS = {
    "requests": "Answers that were begun.",
    "requests_failed": "Requests that ended in an error of the server or the engine.",
    "requests_refused": "Requests that found the queue full.",
    "requests_cancelled": "Requests whose client went away.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were encoded already.",
    "cache_hits": "Answers for whose prompt something was encoded already.",
    "completion_tokens": "Tokens of answers.",
    "canvases": "Canvases that were denoised.",
    "denoising_steps": "Denoising steps.",
    "repairs": "Canvases that were denoised again to follow a form.",
    "prompt_seconds": "Time spent on prompts.",
    "generation_seconds": "Time spent on answers, their prompts included.",
}
_GAUGES = {
    "requests_live": "Answers under way and waiting.",
    "requests_waiting": "Requests in the queue.",
    "sessions": "Conversations whose beginnings are kept.",
    "cached_positions": "Tokens that are encoded in all of them.",
}
_STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)  # a canvas
_STEP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Histogram:
    """How often a value was at most each of some bounds."""

    def __init__(self, name: str, help: str, bounds: Iterable[float]) -> None:
        self._name, self._help, self._bounds = name, help, tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        place = sum(bound < value for bound in self._bounds)
        self._counts[place] += 1
        self._sum += value

    def lines(self) -> list[str]:
        """As Prometheus reads it."""
        found = [f"# HELP {self._name} {self._help}", f"# TYPE {self._name} histogram"]
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{self._name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{self._name}_sum {self._sum}", f"{self._name}_count {total}"]


class Metrics:
    """What all answers together took; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total: Counter[str] = Counter()
        self._steps = Histogram("dgemma_steps_per_canvas", "Denoising steps of a canvas.", _STEPS)
        self._seconds = Histogram("dgemma_step_seconds", "Time of a denoising step.", _STEP_SECONDS)

    def count(self, name: str) -> None:
        """Counts one of what `name` counts."""
        with self._lock:
            self._total[name] += 1

    def add(self, answers: Iterable[Stats]) -> None:
        """Counts answers that have ended in whatever way."""
        with self._lock:
            begun = [stats for stats in answers if stats.timings]
            self._total["requests"] += bool(begun)
            for stats in begun:
                self._add(stats)

    def _add(self, stats: Stats) -> None:
        timings = stats.timings
        self._total.update(
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            cache_hits=int(stats.cached_tokens > 0),
            completion_tokens=stats.completion_tokens,
            canvases=stats.canvases,
            denoising_steps=sum(stats.steps),
            repairs=stats.repairs,
        )
        # Counter counts numbers of any kind; its type only knows whole ones.
        self._total["prompt_seconds"] += timings.get("prompt_s", 0.0)  # type: ignore[assignment]
        self._total["generation_seconds"] += timings.get("total_s", 0.0)  # type: ignore[assignment]
        for steps in stats.steps:
            self._steps.add(steps)
        if stats.steps:
            self._seconds.add(timings.get("step_ms", 0.0) / 1e3)

    def text(self, gauges: Mapping[str, float]) -> str:
        """The page that Prometheus reads; `gauges` are what is now."""
        lines = []
        with self._lock:
            for name, help in _COUNTERS.items():
                full = f"dgemma_{name}_total"
                lines += [f"# HELP {full} {help}", f"# TYPE {full} counter"]
                lines.append(f"{full} {self._total[name]}")
            lines += self._steps.lines() + self._seconds.lines()
        for name, value in gauges.items():
            full = f"dgemma_{name}"
            lines += [f"# HELP {full} {_GAUGES[name]}", f"# TYPE {full} gauge", f"{full} {value}"]
        return "\n".join(lines) + "\n"
