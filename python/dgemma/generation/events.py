"""What an answer gives: drafts while a canvas settles, commits of what is certain, figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..values import FloatArray


@dataclass(frozen=True)
class Draft:
    """A canvas after one denoising step: every position may still change.

    `tokens` (canvas,) and `entropies` (canvas,), in nats, cover the whole canvas; `text` is what
    it reads before position `end`, that of its first end token.
    """

    canvas: int
    step: int
    tokens: list[int]
    text: str
    entropies: FloatArray
    mean_entropy: float
    n_accepted: int
    settled: bool
    end: int


@dataclass(frozen=True)
class Commit:
    """A canvas that is done: its tokens, and the text that is now certain.

    Text that may be the beginning of a stop string, or is an unfinished character, comes with the
    next commit. `finish_reason` is None while the answer goes on.
    """

    canvas: int
    tokens: list[int]
    text: str
    steps: int
    finish_reason: str | None


@dataclass
class Stats:
    """What an answer took. `cached_tokens` of the prompt were already encoded; times in seconds.

    `repairs`: how often a canvas was denoised again because it did not follow the form asked for.
    `stopped_by`: the stop string at which the answer ended.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    canvases: int = 0
    steps: list[int] = field(default_factory=list)
    repairs: int = 0
    seed: int = 0
    stopped_by: str | None = None
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """A whole answer. `finish_reason` is "stop" (end token or stop string) or "length"."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats
