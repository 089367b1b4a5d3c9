"""Text completions in the dictionaries of the OpenAI API, as llama-cpp-python spells them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from ..errors import OptionTypeError, OptionValueError
from ..generation.declared import RequestOptions, declared
from ..generation.events import Draft
from ..generation.structured import json_form
from ..values import Ids
from .answers import Completions, JsonObject
from .host import Host
from .requests import choices

Prompts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
MAX_PROMPTS = 1024


class Completion(Completions):
    """The completions of one text, or of several: `n` choices for each, in their order.

    `prompt`: a text, token ids, or a list of either. `suffix` fills a gap of `max_tokens` tokens
    before it; `suffix_in_text`: it stands behind the answer, as in llama-cpp-python.
    `response_format`: see `structured.json_form`.
    """

    def __init__(
        self,
        llm: Host,
        prompt: Prompts,
        *,
        max_tokens: int | None = 16,
        suffix: str | None = None,
        suffix_in_text: bool = True,
        echo: bool = False,
        model: str | None = None,
        n: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        stream_options: Mapping[str, Any] | None = None,
        warnings: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__("cmpl", model or llm.model_path, stream_options, warnings)
        self._head["object"] = "text_completion"
        prompts = prompt_list(prompt)
        if suffix is not None and not isinstance(suffix, str):
            raise OptionTypeError("suffix must be a text", param="suffix")
        _check_vocabulary(prompts, llm.info.n_vocab)
        if suffix:
            options["pinned"], max_tokens = _behind_gap(llm, suffix, max_tokens)
        if response_format is not None:
            options["form"], _ = json_form(response_format)
        self._n = choices(n)
        self.choices = llm.choices(prompts, n=self._n, max_tokens=max_tokens, **options)
        self._after = suffix if suffix and suffix_in_text else ""
        self._before = [""] * len(prompts)
        if echo:
            decode = llm.tokenizer.decode
            self._before = [p if isinstance(p, str) else decode(p) for p in prompts]

    def events(self) -> Iterator[Draft | JsonObject]:
        """Drafts, and the chunks of a streamed completion between them."""
        begun = -1
        for index, event in self.choices:
            if index > begun:
                begun = index
                before = self._before[index // self._n]
                if before:
                    yield self._chunk(index, before)
            if isinstance(event, Draft):
                yield event
                continue
            if event.text:
                yield self._chunk(index, event.text)
            if event.finish_reason is not None:
                yield self._chunk(index, self._after, event.finish_reason)

    def whole(self) -> JsonObject:
        """The completions in one piece."""
        for _ in self.choices:
            pass
        return self._whole(
            [
                _choice(
                    index,
                    self._before[index // self._n] + result.text + self._after,
                    result.finish_reason,
                )
                for index, result in enumerate(self.choices.results)
            ]
        )

    def _chunk(self, index: int, text: str, finish_reason: str | None = None) -> JsonObject:
        return {**self._head, "choices": [_choice(index, text, finish_reason)]}


def _choice(index: int, text: str, finish_reason: str | None) -> JsonObject:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}


def prompt_list(prompt: Any) -> list[str | Ids]:
    """The prompts in a text, token ids, or a list of either; OptionError for anything else."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence):
        raise OptionTypeError(
            "prompt must be a text, token ids, or a list of either", param="prompt"
        )
    if not prompt:
        raise OptionValueError("prompt is an empty list", param="prompt")
    if len(prompt) > MAX_PROMPTS and not _is_ids(prompt):
        raise OptionValueError(
            f"prompt has {len(prompt)} entries: at most {MAX_PROMPTS}", param="prompt"
        )
    if _is_ids(prompt):
        return [list(map(int, prompt))]
    for index, entry in enumerate(prompt):
        if not isinstance(entry, str) and not (
            isinstance(entry, Sequence) and entry and _is_ids(entry)
        ):
            raise OptionTypeError(
                f"prompt[{index}] must be a text or token ids, as the others are", param="prompt"
            )
    return [entry if isinstance(entry, str) else list(map(int, entry)) for entry in prompt]


def _check_vocabulary(prompts: Sequence[str | Ids], n_vocab: int) -> None:
    for ids in prompts:
        for token in () if isinstance(ids, str) else ids:
            if not 0 <= token < n_vocab:
                raise OptionValueError(
                    f"prompt has the token id {token}: the vocabulary has {n_vocab}", param="prompt"
                )


def _is_ids(entries: Sequence[Any]) -> bool:
    """3.0 is a whole number, True is none."""
    return all(
        not isinstance(entry, bool)
        and (isinstance(entry, Integral) or (isinstance(entry, float) and entry.is_integer()))
        for entry in entries
    )


def _behind_gap(llm: Host, suffix: str, max_tokens: int | None) -> tuple[dict[int, int], int]:
    """Pinned tokens of a suffix behind a gap of `max_tokens`, and that number."""
    length = llm.info.canvas_length
    limit = declared(RequestOptions)["max_tokens"].check(max_tokens)
    gap = length // 2 if limit is None else limit
    if not 1 <= gap < length:
        raise OptionValueError(
            f"max_tokens is {gap}: with a suffix, the gap and some of the suffix must fit "
            f"a canvas of {length} tokens",
            param="max_tokens",
        )
    after = llm.tokenizer.encode_start(suffix, length - gap)
    return {gap + i: token for i, token in enumerate(after)}, gap
