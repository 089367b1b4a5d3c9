"""Requests as other programs write them.

What means nothing here is let pass and named; what would mislead is refused.
A server reads a body with the same call that the Python API uses:

    accepted = accept(body, ChatOptions, strict=strict, unknown="ignore")
    made = ChatCompletion(llm, **accepted.options, warnings=accepted.warnings)

`accepted.options` holds only what `ChatCompletion` knows, with values that stood for nothing left
out; `accepted.warnings` are sentences for the log and for the answer's `warnings`. What is wrong
is an `OptionError` with `param` and `code`. Numbers are checked when the answer is made.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, cast, get_args, get_origin, get_type_hints

from ..errors import IgnoredOptionWarning, OptionTypeError, OptionValueError
from ..generation.declared import (
    MAX_CHOICES,
    Declared,
    GenerationOptions,
    Option,
    RequestOptions,
    declared,
    names,
)

_ONE_TOKEN = "it picks one token at a time, and a canvas is denoised as a whole"
_NO_PROBABILITIES = "a settled canvas has no probability per token in order"
_NOTHING_TO_DO = "it changes nothing here"
MAX_NAME = 100  # characters of a name that nobody knows which errors and warnings show


@dataclass(frozen=True)
class Foreign:
    """What is annotated to another program's option.

    `neutral` values ask for nothing; `reason` says why others have no effect. `refused`: an answer
    without it would be taken for what it is not.
    """

    neutral: tuple[Any, ...] = ()
    reason: str = _ONE_TOKEN
    refused: bool = False

    def is_neutral(self, value: Any) -> bool:
        """Whether the value asks for nothing."""
        return value is None or any(
            value == n and isinstance(value, bool) == isinstance(n, bool) for n in self.neutral
        )


class ForeignOptions(TypedDict, total=False):
    """Options of other programs; what they ask for does not exist for a canvas."""

    top_p: Annotated[float | None, Foreign((1,))]
    top_k: Annotated[int | None, Foreign((0, -1))]
    min_p: Annotated[float | None, Foreign((0,))]
    top_a: Annotated[float | None, Foreign((0,))]
    typical_p: Annotated[float | None, Foreign((1,))]
    tfs_z: Annotated[float | None, Foreign((1,))]
    top_n_sigma: Annotated[float | None, Foreign((-1,))]
    mirostat: Annotated[int | None, Foreign((0,))]
    mirostat_mode: Annotated[int | None, Foreign((0,))]
    mirostat_tau: Annotated[float | None, Foreign((5,))]
    mirostat_eta: Annotated[float | None, Foreign((0.1,))]
    presence_penalty: Annotated[float | None, Foreign((0,))]
    frequency_penalty: Annotated[float | None, Foreign((0,))]
    repeat_penalty: Annotated[float | None, Foreign((1,))]
    repetition_penalty: Annotated[float | None, Foreign((1,))]
    repeat_last_n: Annotated[int | None, Foreign((0,))]
    penalize_nl: Annotated[bool | None, Foreign((False,))]
    length_penalty: Annotated[float | None, Foreign((1,))]
    no_repeat_ngram_size: Annotated[int | None, Foreign((0,))]
    dynatemp_range: Annotated[float | None, Foreign((0,))]
    dynatemp_exponent: Annotated[float | None, Foreign((1,))]
    dry_multiplier: Annotated[float | None, Foreign((0,))]
    dry_base: Annotated[float | None, Foreign((1.75,))]
    dry_allowed_length: Annotated[int | None, Foreign((2,))]
    dry_penalty_last_n: Annotated[int | None, Foreign((-1, 0))]
    dry_sequence_breakers: Annotated[Sequence[str] | None, Foreign(([],))]
    xtc_probability: Annotated[float | None, Foreign((0,))]
    xtc_threshold: Annotated[float | None, Foreign((0.1, 0.5))]
    samplers: Annotated[Sequence[str] | str | None, Foreign()]
    logit_bias: Annotated[Mapping[Any, float] | Sequence[Any] | None, Foreign(({}, []))]
    logits_processor: Annotated[Any, Foreign()]
    stopping_criteria: Annotated[
        Any, Foreign(reason="use `stop`, or leave the loop over `stream`", refused=True)
    ]
    logprobs: Annotated[bool | int | None, Foreign((False,), _NO_PROBABILITIES, refused=True)]
    top_logprobs: Annotated[int | None, Foreign((0,), _NO_PROBABILITIES, refused=True)]
    n_probs: Annotated[int | None, Foreign((0,), _NO_PROBABILITIES, refused=True)]
    grammar: Annotated[
        Any,
        Foreign(
            ("",),
            "ask for JSON with `response_format`, which is checked and repaired",
            refused=True,
        ),
    ]
    best_of: Annotated[
        int | None,
        Foreign((1,), "answers have no probability to rank them by: ask for `n`", refused=True),
    ]


class AnswerOptions(GenerationOptions, ForeignOptions, total=False):
    """The options of `generate` and `stream`."""


class _CompletionOptions(AnswerOptions, total=False):
    model: str | None
    n: Annotated[
        int | None,
        Option("answers to each prompt, with the seeds seed, seed + 1, …", low=1, high=MAX_CHOICES),
    ]
    stream_options: Mapping[str, Any] | None
    user: Annotated[str | None, Foreign(reason=_NOTHING_TO_DO)]


class CompletionOptions(_CompletionOptions, total=False):
    """The options of `create_completion`.

    `suffix`: text behind a gap of `max_tokens` tokens, which is filled. `echo`: the prompt stands
    before the answer. `response_format`: as in a conversation, but nothing tells the model of it.
    """

    suffix: str | None
    echo: bool | None
    response_format: Mapping[str, Any] | None


class ChatOptions(_CompletionOptions, total=False):
    """The options of `create_chat_completion`.

    `enable_thinking`: the model may think first. `max_completion_tokens`: OpenAI's newer name of
    `max_tokens`. `functions` and `function_call`: older names of `tools` and `tool_choice`.
    """

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: Annotated[bool | None, Foreign((True,), _NOTHING_TO_DO)]
    functions: Sequence[Mapping[str, Any]] | None
    function_call: str | Mapping[str, Any] | None
    response_format: Mapping[str, Any] | None
    enable_thinking: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    max_completion_tokens: int | None


@dataclass(frozen=True)
class Accepted:
    """The options that remain of a request, and sentences about those that do not."""

    options: dict[str, Any]
    warnings: tuple[str, ...] = ()


def accept(
    given: Mapping[str, Any],
    kind: type[Any],
    *,
    strict: bool = False,
    unknown: Literal["refuse", "ignore"] = "refuse",
    also: Sequence[str] = (),
) -> Accepted:
    """The options of a TypedDict among those of a request; None is as good as absent.

    `strict` refuses what has no effect, unknown names too. `also`: names besides the TypedDict's.
    Errors: OptionTypeError, OptionValueError.
    """
    foreign = _foreign(cast("Hashable", kind))
    known = names(kind) | {*also}
    options: dict[str, Any] = {}
    found: list[str] = []
    for name, value in given.items():
        if name in foreign:
            if not foreign[name].is_neutral(value):
                found.append(_without_effect(name, value, foreign[name], given, strict))
        elif name not in known:
            if unknown == "refuse" or strict:
                raise _unknown(name, known)
            if value is not None:
                found.append(f"{name[:MAX_NAME]} is not known here and was ignored")
        elif value is not None:
            options[name] = value
    return Accepted(options, tuple(filter(None, found)))


def _without_effect(
    name: str, value: Any, foreign: Foreign, given: Mapping[str, Any], strict: bool
) -> str:
    if name == "best_of" and value == given.get("n"):
        return ""
    if foreign.refused or (strict and foreign.reason != _NOTHING_TO_DO):
        raise OptionValueError(
            f"{name} is not supported: {foreign.reason}", param=name, code="unsupported_parameter"
        )
    return "" if foreign.reason == _NOTHING_TO_DO else f"{name} has no effect: {foreign.reason}"


def _unknown(name: str, known: frozenset[str]) -> OptionTypeError:
    name = name[:MAX_NAME]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return OptionTypeError(f"unknown option {name!r}{hint}", param=name, code="unknown_parameter")


@functools.cache
def _foreign(kind: Any) -> dict[str, Foreign]:
    return {
        name: get_args(hint)[1]
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if get_origin(hint) is Annotated and isinstance(get_args(hint)[1], Foreign)
    }


def choices(n: Any) -> int:
    """How many answers `n` asks for."""
    return declared(CompletionOptions)["n"].check(n) or 1


_warned: set[str] = set()


def warn_once(messages: Sequence[str], stacklevel: int = 3) -> None:
    """Warns of each of these for the first time in this process."""
    for message in messages:
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, IgnoredOptionWarning, stacklevel=stacklevel)


__all__ = [
    "Accepted",
    "AnswerOptions",
    "ChatOptions",
    "CompletionOptions",
    "Declared",
    "ForeignOptions",
    "GenerationOptions",
    "RequestOptions",
    "accept",
    "choices",
    "warn_once",
]
