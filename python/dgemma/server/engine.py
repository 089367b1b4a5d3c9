"""What the routes need of a model: the interface between HTTP and whoever makes the answers.

`LocalEngine` has the model in this process. A front end that keeps it elsewhere (in another
process, on another machine) implements `Engine` and gives it to `create_app`: no route knows a
model, and all that crosses the interface is plain values.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from ..errors import Error

JsonObject: TypeAlias = dict[str, Any]


class QueueFullError(Error):
    """No more requests may wait; `retry_after` is when to come again, in seconds."""

    def __init__(self, message: str, retry_after: int = 2) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.retry_after)


@dataclass(frozen=True)
class Card:
    """What a model is, for those who ask: sizes, defaults, and its name in the API.

    `n_ctx`: tokens of context, the canvas included. `sampling`: what a request leaves open.
    `info`: sizes of the model and what it runs on. `file`: name of its file.
    """

    name: str
    n_ctx: int
    canvas_length: int
    sampling: Mapping[str, Any]
    info: Mapping[str, Any]
    file: str = ""
    chat_template: str = ""
    bos_token: str = ""
    eos_token: str = ""
    n_slots: int = 1


@dataclass(frozen=True)
class Ask:
    """One request for answers.

    `kind`: a conversation ("chat") or a text that is continued ("completion"). `options`: the
    arguments of `create_chat_completion` or `create_completion`, `messages` and `prompt` included.
    `drafts`: events of the settling canvas are wanted. `client`: who asks, by whatever name, so
    that one who asks much does not keep others waiting.
    """

    kind: Literal["chat", "completion"]
    options: Mapping[str, Any]
    stream: bool = False
    drafts: bool = False
    client: str = ""


@dataclass(frozen=True)
class Event:
    """What an answer gives.

    "chunk": a chunk of a stream in the form of the OpenAI API; not streamed, the whole completion,
    once. "draft": a canvas after one denoising step. "end", the last one: `usage` and `stats`.
    """

    name: Literal["chunk", "draft", "end"]
    data: JsonObject


@dataclass
class Progress:
    """How far a request has come: it waits, or its prompt is read, or its canvas is denoised."""

    state: Literal["queued", "reading", "writing"] = "queued"
    ahead: int = 0  # requests that come before it


class Opened(Protocol):
    """A request that has been checked and encoded; the answer is made while `events` is read."""

    @property
    def warnings(self) -> Sequence[str]:
        """What was ignored of the request, in sentences."""

    @property
    def opening(self) -> Sequence[JsonObject]:
        """Chunks of a stream that need no model: they are sent before the request's turn comes."""

    @property
    def progress(self) -> Progress:
        """How far it has come."""

    def events(self) -> AsyncIterator[Event]:
        """Waits for its turn and makes the answer; raises what making it raised."""

    def cancel(self) -> None:
        """Ends the answer within one denoising step; no other one is touched."""


class Engine(Protocol):
    """Makes answers for the routes."""

    @property
    def card(self) -> Card:
        """The model."""

    async def open(self, ask: Ask) -> Opened:
        """Checks a request and puts it into the queue.

        Raises ValueError and TypeError (OptionError where a field is to blame),
        ContextLengthError and QueueFullError.
        """

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""

    async def detokenize(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes that each token stands for, control tokens spelled out."""

    async def render(self, messages: Sequence[Any], **options: Any) -> str:
        """The prompt for a conversation; `options` are those of `ChatTemplate.render`."""

    async def count(self, messages: Sequence[Any], **options: Any) -> int:
        """Tokens of the prompt for a conversation."""

    def slots(self) -> list[JsonObject]:
        """The conversations whose beginnings are kept, and what each is doing."""

    def metrics(self) -> str:
        """Counters in Prometheus' text form."""

    async def close(self) -> None:
        """Cancels what is under way."""


@dataclass
class Settings:
    """How the application behaves, whatever its engine.

    `api_keys`: one of them is asked of every request but /health; none: everybody may ask.
    `hosts`: names it may be addressed by; None: any. `origins`: web pages of other sites that may
    ask, "*" for all. `strict`: options without effect are refused. `max_body`: bytes of a request.
    `kept_bytes`: for answers that a client may go on from by their id; 0 keeps none.
    """

    api_keys: frozenset[str] = frozenset()
    hosts: frozenset[str] | None = None
    origins: Sequence[str] = field(default_factory=tuple)
    strict: bool = False
    max_body: int = 8 * 2**20
    kept_bytes: int = 64 * 2**20
