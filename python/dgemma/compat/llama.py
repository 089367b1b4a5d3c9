"""The methods of llama-cpp-python's `Llama`, for programs that were written for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from ..chat import Message
from ..errors import OptionTypeError
from .answers import Completions, JsonObject
from .chat import ChatCompletion
from .completions import Completion, Prompts
from .requests import ChatOptions, CompletionOptions, accept, warn_once

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._native import Session
    from ..tokenizer import Tokenizer
    from ..values import ModelInfo
    from .host import Host

# The names of positional arguments behind the first, in their order there.
COMPLETION_ORDER = (
    *("suffix", "max_tokens", "temperature", "top_p", "min_p", "typical_p", "logprobs", "echo"),
    *("stop", "frequency_penalty", "presence_penalty", "repeat_penalty", "top_k", "stream"),
    *("seed", "tfs_z", "mirostat_mode", "mirostat_tau", "mirostat_eta", "model"),
    *("stopping_criteria", "logits_processor", "grammar", "logit_bias"),
)
CHAT_ORDER = (
    *("functions", "function_call", "tools", "tool_choice", "temperature", "top_p", "top_k"),
    *("min_p", "typical_p", "stream", "stop", "seed", "response_format", "max_tokens"),
    *("presence_penalty", "frequency_penalty", "repeat_penalty", "tfs_z", "mirostat_mode"),
    *("mirostat_tau", "mirostat_eta", "model", "logits_processor", "grammar", "logit_bias"),
    *("logprobs", "top_logprobs"),
)


class LlamaMethods:
    """What `DiffusionGemma` has in common with `llama_cpp.Llama`, under the same names."""

    info: ModelInfo
    strict: bool
    chat_handler: Any

    if TYPE_CHECKING:

        @property
        def tokenizer(self) -> Tokenizer:
            """The file's tokenizer."""

        @property
        def default_session(self) -> Session:
            """The session that answers use when they name no other."""

    # ---- Text and tokens -------------------------------------------------------------------------

    def tokenize(self, text: bytes | str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text; `special`: control tokens that are spelled out are recognised."""
        decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self.tokenizer.encode(
            decoded, add_bos=add_bos and self.tokenizer.add_bos, special=special
        )

    def detokenize(
        self, tokens: Iterable[int], prev_tokens: Iterable[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes that tokens stand for; `special`: control tokens are spelled out.

        `prev_tokens` is there for llama-cpp-python's sake: the text does not depend on them.
        """
        pieces = (self.tokenizer.token_bytes(int(t), special=special) for t in tokens)
        return b"".join(pieces)

    def n_ctx(self) -> int:
        """Tokens of context, the canvas included."""
        return self.default_session.n_ctx

    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.info.n_vocab

    def n_embd(self) -> int:
        """Width of the residual stream."""
        return self.info.n_embd

    @property
    def n_tokens(self) -> int:
        """Tokens that are encoded, of the last prompt and answer."""
        return self.default_session.n_past

    def token_bos(self) -> int:
        """Id of the begin token; -1 where there is none."""
        return -1 if self.tokenizer.bos is None else self.tokenizer.bos

    def token_eos(self) -> int:
        """Id of the first of the tokens that end an answer."""
        return self.info.end_tokens[0]

    @property
    def eval_tokens(self) -> list[int]:
        """The tokens that are encoded, of the last prompt and answer."""
        return list(map(int, self.default_session.tokens))

    def pooling_type(self) -> int:
        """That of a model without embeddings, 0."""
        return 0

    @staticmethod
    def longest_token_prefix(a: Sequence[int], b: Sequence[int]) -> int:
        """How many tokens two sequences begin with alike."""
        return next(
            (i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other),
            min(len(a), len(b)),
        )

    def token_nl(self) -> int:
        """Id of the first token of a new line."""
        return self.tokenizer.encode("\n")[0]

    # ---- Answers ---------------------------------------------------------------------------------

    @overload
    def create_completion(
        self,
        prompt: Prompts,
        *positional: Any,
        stream: Literal[False] = False,
        **options: Unpack[CompletionOptions],
    ) -> JsonObject: ...
    @overload
    def create_completion(
        self,
        prompt: Prompts,
        *positional: Any,
        stream: Literal[True],
        **options: Unpack[CompletionOptions],
    ) -> Iterator[JsonObject]: ...
    @overload
    def create_completion(
        self,
        prompt: Prompts,
        *positional: Any,
        stream: bool,
        **options: Unpack[CompletionOptions],
    ) -> JsonObject | Iterator[JsonObject]: ...
    def create_completion(
        self,
        prompt: Prompts,
        *positional: Any,
        stream: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> JsonObject | Iterator[JsonObject]:
        """Continues a prompt in the dictionaries of the OpenAI API.

        `prompt`: a text, token ids, or a list of either, each of which gets its choices.
        `stream=True` returns an iterator of chunks. `max_tokens` is 16 unless it is given. What
        has no effect is named once in a warning, and in the answer's `warnings`. Positional
        arguments stand in llama-cpp-python's order.
        """
        given = self._arguments("create_completion", COMPLETION_ORDER, positional, options)
        stream = bool(given.pop("stream", stream))
        accepted = accept(given, CompletionOptions, strict=self._strict(given))
        warn_once(accepted.warnings)
        made = Completion(
            cast("Host", self), prompt, **accepted.options, warnings=accepted.warnings
        )
        return _answered(made, stream)

    __call__ = create_completion

    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *positional: Any,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> JsonObject: ...
    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *positional: Any,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> Iterator[JsonObject]: ...
    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *positional: Any,
        stream: bool,
        **options: Unpack[ChatOptions],
    ) -> JsonObject | Iterator[JsonObject]: ...
    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *positional: Any,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> JsonObject | Iterator[JsonObject]:
        """Answers a conversation in the dictionaries of the OpenAI API.

        `stream=True` returns an iterator of chunks. Thoughts come as `reasoning_content`, calls as
        `tool_calls`; neither is ever part of `content`. With a `response_format` of JSON the text
        is checked and repaired before it is given out: ResponseFormatError where that fails. What
        has no effect is named once in a warning, and in the answer's `warnings`. Positional
        arguments stand in llama-cpp-python's order.
        """
        given = self._arguments("create_chat_completion", CHAT_ORDER, positional, options)
        stream = bool(given.pop("stream", stream))
        if self.chat_handler is not None:
            handled = self.chat_handler(llama=self, messages=messages, stream=stream, **given)
            return cast("JsonObject | Iterator[JsonObject]", handled)
        accepted = accept(given, ChatOptions, strict=self._strict(given))
        warn_once(accepted.warnings)
        host = cast("Host", self)
        made = ChatCompletion(host, messages, **accepted.options, warnings=accepted.warnings)
        return _answered(made, stream)

    def create_chat_completion_openai_v1(
        self, messages: Sequence[Message], *positional: Any, **options: Any
    ) -> Any:
        """The same as objects of the package `openai`, which must be installed."""
        from openai.types.chat import ChatCompletion as Whole
        from openai.types.chat import ChatCompletionChunk as Chunk

        made: Any = self.create_chat_completion(messages, *positional, **options)
        if isinstance(made, Mapping):
            return Whole.model_validate(made)
        return (Chunk.model_validate(chunk) for chunk in made)

    def _strict(self, given: dict[str, Any]) -> bool:
        asked = given.pop("strict", None)
        return self.strict if asked is None else bool(asked)

    @staticmethod
    def _arguments(
        function: str, order: Sequence[str], positional: Sequence[Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All arguments by their names."""
        if len(positional) > len(order):
            raise OptionTypeError(
                f"{function}() takes {1 + len(order)} positional arguments at most, "
                f"not {1 + len(positional)}"
            )
        given = dict(zip(order, positional, strict=False))
        for name in options:
            if name in given:
                raise OptionTypeError(f"{function}() got {name!r} twice", param=name)
        return {**given, **options}

    # ---- State -----------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Encodes tokens behind those that are there."""
        self.default_session.prefill(tokens)

    def save_state(self) -> bytes:
        """The conversation's cache, as `save` writes it, in memory."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "session")
            self.default_session.save(path)
            with open(path, "rb") as file:
                return file.read()

    def load_state(self, state: bytes) -> None:
        """Takes back a cache that `save_state` gave."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "session")
            with open(path, "wb") as file:
                file.write(state)
            self.default_session.load(path)

    def set_cache(self, cache: Any) -> None:
        """Without effect: every session keeps what it has encoded."""
        if cache is not None:
            warn_once(
                ["set_cache has no effect: every session keeps what it has encoded, and more of "
                 "them come from `session()`"]
            )  # fmt: skip

    def embed(self, *_: object, **__: object) -> Any:
        """Refused: the model writes text, and was not trained to describe any as a vector."""
        raise NotImplementedError(
            "DiffusionGemma gives no embeddings: it was trained to write text. "
            "Use a model that was made for them"
        )

    create_embedding = embed

    def sample(self, *_: object, **__: object) -> Any:
        """Refused: a canvas is denoised as a whole, and no token of it is picked alone."""
        raise NotImplementedError(
            "DiffusionGemma does not pick one token at a time: use `generate`, or `stream` for the "
            "steps between"
        )


def _answered(made: Completions, stream: bool) -> JsonObject | Iterator[JsonObject]:
    return made.chunks() if stream else made.whole()
