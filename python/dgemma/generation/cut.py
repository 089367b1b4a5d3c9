"""Where an answer ends: at end tokens, stop strings and max_tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..tokenizer import Tokenizer
from .options import Options


class Cutter:
    """Cuts an answer at end tokens, stop strings and max_tokens, whatever borders they cross."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int], options: Options) -> None:
        self._decoder = tokenizer.decoder()
        self._ends, self._options = frozenset(ends), options
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self._length = 0  # characters decoded so far
        self._starts: list[int] = []  # where each token's text begins
        self.tokens: list[int] = []
        self.stopped_by: str | None = None  # the stop string at which it ended

    def add(self, tokens: Sequence[int]) -> tuple[str, str | None]:
        """The text that is certain now, and why the answer ends here, if it does."""
        limit = self._options.max_tokens
        for token in tokens:
            if token in self._ends:
                return self.finish(), "stop"
            if limit is not None and len(self.tokens) == limit:
                break
            self.tokens.append(token)
            self._starts.append(self._length)
            self._take(self._decoder.feed(token))
            found = self._stop_at()
            if found is not None:
                return found, "stop"
        if limit is not None and len(self.tokens) == limit:
            return self.finish(), "length"
        keep = len(self._held) - self._unsure()
        text, self._held = self._held[:keep], self._held[keep:]
        return text, None

    def finish(self) -> str:
        """The text that was held back."""
        self._take(self._decoder.finish())
        text, self._held = self._held, ""
        return text

    def _take(self, text: str) -> None:
        self._held += text
        self._length += len(text)

    def _stop_at(self) -> str | None:
        places = [(self._held.find(stop), stop) for stop in self._options.stop]
        at, self.stopped_by = min((place for place in places if place[0] >= 0), default=(-1, None))
        if at < 0:
            return None
        end = self._length - len(self._held) + at
        n_before = sum(start < end for start in self._starts)
        del self.tokens[n_before:], self._starts[n_before:]
        text, self._held = self._held[:at], ""
        return text

    def _unsure(self) -> int:
        """Length of the longest ending that some stop string begins with."""
        for length in range(min(len(self._held), self._longest() - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._options.stop):
                return length
        return 0

    def _longest(self) -> int:
        return max(map(len, self._options.stop), default=0)
