"""What requests may contain: the shape of their bodies, as /openapi.json shows it.

Only the shape is checked here. What an option may be is declared with the options themselves, and
checked where an answer is made of them.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from .failures import BadRequestError

MAX_MESSAGES = 10_000

Whole = Annotated[Any, WithJsonSchema({"type": ["integer", "null"]})]
Number = Annotated[Any, WithJsonSchema({"type": ["number", "null"]})]
Object = Annotated[Any, WithJsonSchema({"type": ["object", "null"]})]
Texts = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "string"}}]}
    ),
]
Messages = Annotated[
    list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES, description="the turns")
]


class Body(BaseModel):
    """Any body: fields that nobody knows are let pass, and named in the answer's warnings."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def given(self) -> dict[str, Any]:
        """The fields that say something: null is as good as absent."""
        named = {n: getattr(self, n) for n in self.model_fields_set if n in type(self).model_fields}
        found = {**named, **(self.model_extra or {})}
        return {name: value for name, value in found.items() if value is not None}


class Generation(Body):
    """What all requests for answers share."""

    model: Any = Field(default=None, description="any name: there is one model")
    stream: bool | None = False
    drafts: bool | None = Field(default=False, description="events of the settling canvas")
    max_tokens: Whole = None
    stop: Texts = None
    seed: Whole = None
    temperature: Number = Field(
        default=None, description="scales t_min and t_max; 1 is the model's own, 0 the lowest"
    )
    n: Whole = None
    max_denoising_steps: Whole = None
    t_min: Number = None
    t_max: Number = None
    entropy_bound: Number = None
    stability_threshold: Whole = None
    confidence_threshold: Number = None
    stream_options: Object = None


class ChatRequest(Generation):
    """`/v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Whole = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    tool_choice: Any = None
    response_format: Any = None
    chat_template_kwargs: Object = None
    reasoning_effort: str | None = None


class CompletionRequest(Generation):
    """`/v1/completions`."""

    prompt: str | list[Any] = Field(description="a text, token ids, or a list of either")
    suffix: str | None = None
    echo: bool | None = False


class ResponsesRequest(Body):
    """`/v1/responses`."""

    input: str | list[Any] = Field(description="a text, or the items of the conversation")
    instructions: str | None = None
    model: Any = None
    stream: bool | None = False
    max_output_tokens: Whole = None
    temperature: Number = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    tool_choice: Any = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


class CountRequest(Body):
    """`/v1/messages/count_tokens`."""

    messages: Messages
    system: str | list[Any] | None = None
    model: Any = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """`/v1/messages`."""

    max_tokens: Whole = None
    stream: bool | None = False
    stop_sequences: list[str] | None = None
    temperature: Number = None


class LlamaRequest(Body):
    """`/completion`."""

    prompt: str | list[Any] = Field(description="a text, or token ids")
    n_predict: Whole = None
    stream: bool | None = False
    stop: Texts = None
    seed: Whole = None
    temperature: Number = None


class InfillRequest(Body):
    """`/infill`."""

    input_prefix: str
    input_suffix: str
    input_extra: list[dict[str, Any]] | None = None
    prompt: str | None = None
    n_predict: Whole = None
    stream: bool | None = False
    stop: Texts = None
    seed: Whole = None
    temperature: Number = None


class TokenizeRequest(Body):
    """`/tokenize`."""

    content: str
    add_special: bool | None = False
    parse_special: bool | None = True
    with_pieces: bool | None = False


class DetokenizeRequest(Body):
    """`/detokenize`."""

    tokens: list[int] = Field(max_length=2**18)


class TemplateRequest(Body):
    """`/apply-template`."""

    messages: Messages
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    chat_template_kwargs: Object = None


R = TypeVar("R", bound=Body)


# How pydantic names the kinds of a union, of which the first is to blame.
_KINDS = ("str", "list[any]")


def _place(steps: tuple[int | str, ...]) -> str:
    """Where something stands, as errors of OpenAI's API say it: messages[0].role."""
    names = [step for step in steps if step not in _KINDS]
    return "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in names).removeprefix(".")


def checked(value: Any, kind: type[R]) -> R:
    """The request in a JSON value; BadRequestError says what is wrong with it."""
    try:
        return kind.model_validate(value)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        place = _place(first["loc"])
        missing = first["type"] == "missing"
        several = first["loc"][-1:] == ("str",)
        told = "Input should be a text or a list" if several else first["msg"]
        raise BadRequestError(
            f"{place or 'the body'}: {told}",
            param=place or None,
            code="missing_required_parameter" if missing else "invalid_type",
        ) from None
