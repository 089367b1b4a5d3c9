"""What completions of text and of conversations have in common: head, usage, warnings, streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import OptionTypeError
from ..generation.choices import Choices
from ..generation.events import Draft, Generated
from ..generation.generate import Answer

JsonObject: TypeAlias = dict[str, Any]


class Completions:
    """The answers to one request, as dictionaries; see `Completion` and `ChatCompletion`.

    `choices.prompts` are the token ids that will be encoded, `choices.use(session)` chooses where.
    """

    choices: Choices
    _n: int

    def __init__(
        self,
        kind: str,
        model: str,
        stream_options: Mapping[str, Any] | None,
        warnings: Sequence[str],
    ) -> None:
        self._head: JsonObject = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self.warnings = tuple(warnings)
        if stream_options is not None and not isinstance(stream_options, Mapping):
            raise OptionTypeError("stream_options must be an object", param="stream_options")
        self._with_usage = bool((stream_options or {}).get("include_usage"))

    @property
    def answer(self) -> Answer:
        """The first answer."""
        return self.choices.answers[0]

    def usage(self) -> JsonObject:
        """Token counts of all answers; the tokens of a prompt with several are counted once."""
        results = self.choices.results
        total = usage(results[0])
        for index, result in enumerate(results[1:], 1):
            if index % self._n == 0:
                total["prompt_tokens"] += result.stats.prompt_tokens
                cached = total["prompt_tokens_details"]
                cached["cached_tokens"] += result.stats.cached_tokens
            total["completion_tokens"] += result.stats.completion_tokens
        total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
        return total

    def events(self) -> Iterator[Draft | JsonObject]:
        """Drafts, and the chunks of a streamed answer between them."""
        raise NotImplementedError

    def chunks(self) -> Iterator[JsonObject]:
        """The chunks of a streamed answer; with `include_usage`, one with token counts is last."""
        head: JsonObject = {}
        for event in self.events():
            if isinstance(event, Draft):
                continue
            if not head and self.warnings:
                event = {**event, "warnings": list(self.warnings)}
            head = event
            yield {**event, "usage": None} if self._with_usage else event
        if self._with_usage:
            yield {**head, "choices": [], "usage": self.usage()}

    def whole(self) -> JsonObject:
        """The answers in one piece."""
        raise NotImplementedError

    def _whole(self, choices: list[JsonObject]) -> JsonObject:
        made = {**self._head, "choices": choices, "usage": self.usage()}
        return {**made, "warnings": list(self.warnings)} if self.warnings else made


def usage(result: Generated) -> JsonObject:
    """Token counts of an answer."""
    stats = result.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }
