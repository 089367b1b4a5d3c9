"""What requests may contain. Names and ranges are checked here and trusted afterwards."""

from __future__ import annotations

import json
import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class BadRequestError(ValueError):
    """The request itself is wrong; `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Strict(BaseModel):
    # An option that is not known here would be ignored, and the answer not what was asked for.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Generation(_Strict):
    """What chat and text completions share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    drafts: bool = False
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    max_denoising_steps: int | None = None
    t_min: float | None = None
    t_max: float | None = None
    entropy_bound: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    # Refused by the options' own check unless their value changes nothing.
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    grammar: str | None = None
    # Notes of the client's own, which ask for nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def options(self) -> dict[str, Any]:
        """The arguments for `create_completion` and `create_chat_completion`."""
        own = {"stream", "stream_options", "drafts", "user", "metadata", "store"}
        return {
            name: value for name, value in self.model_dump(exclude=own).items() if value is not None
        }


class ChatRequest(_Generation):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[Literal["enable_thinking"], bool] | None = None

    def options(self) -> dict[str, Any]:
        """The arguments for `create_chat_completion`."""
        options = super().options()
        options.pop("parallel_tool_calls", None)
        options.update(options.pop("chat_template_kwargs", {}))
        limit = options.pop("max_completion_tokens", None)
        if limit is not None:
            options["max_tokens"] = limit
        return options


class CompletionRequest(_Generation):
    """`/v1/completions`."""

    prompt: str | list[int]
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None


class TokenizeRequest(_Strict):
    """`/tokenize`."""

    content: str
    add_special: bool = False
    parse_special: bool = True


class DetokenizeRequest(_Strict):
    """`/detokenize`."""

    tokens: list[int]


class TemplateRequest(_Strict):
    """`/apply-template`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[Literal["enable_thinking"], bool] | None = None


R = TypeVar("R", bound=BaseModel)


def parse(body: bytes, kind: type[R]) -> R:
    """The request in a body; BadRequestError says what is wrong with it."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        _check_numbers(value)
    except UnicodeDecodeError:
        raise BadRequestError("the body is not UTF-8") from None
    except RecursionError:
        raise BadRequestError("the body is nested too deeply") from None
    except ValueError as problem:
        raise BadRequestError(f"the body is not JSON: {problem}") from None
    try:
        return kind.model_validate(value)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        raise BadRequestError(f"{place}: {first['msg']}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_numbers(value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError("a number is too large")
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
