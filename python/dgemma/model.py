"""`DiffusionGemma`: a model file, and everything that can be asked of it."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import hub
from ._native import Model, Session
from .chat.template import ChatTemplate, Message
from .compat.completions import ChatCompletion, Completion, JsonObject
from .compat.llama_arguments import check_constructor
from .errors import ModelFileError
from .generation.generate import Answer, Commit, Draft, Generated
from .generation.options import make_options
from .tokenizer import Tokenizer
from .values import GpuPlan, Memory, ModelInfo

Prompt = str | Sequence[int]


class DiffusionGemma:
    """A loaded model with one conversation's cache; more of these come from `session`.

    Args:
        model_path: the GGUF file, or the first of its shards.
        n_ctx: tokens of context, at most what the model was trained for; 0: all of that.
        n_batch: prompt tokens encoded at a time.
        n_threads: None: one a physical core.
        n_gpu_layers: how many layers, the last ones, the GPU keeps; "auto": as many as fit.
        n_cpu_moe: the experts of the last so many layers stay on the CPU; "auto" may add more.
        backend: "auto", "cpu" or "cuda".
        type_k, type_v: type of the cache: "f32", "f16", "bf16" or "q8_0".
        use_mmap: False reads the file into memory.
        seed: for every answer that names none; None: a new one each time.
        verbose: show the progress of loading on standard error.

    The other arguments of llama-cpp-python's `Llama` are taken where they change nothing, and
    refused with a reason where they ask for something that is not here.

    Errors: ModelFileError, OutOfMemoryError, BackendError, FileAccessError, ValueError.

    Answers may be asked for from any thread; one session makes one at a time. `close` is safe at
    any time, from any thread: what runs is cancelled.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int = 8192,
        n_batch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int | str = "auto",
        n_cpu_moe: int = 0,
        backend: str = "auto",
        type_k: int | str | None = "f16",
        type_v: int | str | None = "f16",
        use_mmap: bool = True,
        seed: int | None = None,
        verbose: bool = False,
        **others: Any,
    ) -> None:
        check_constructor(others)
        if isinstance(n_gpu_layers, str) and n_gpu_layers != "auto":
            raise ValueError(f'n_gpu_layers is {n_gpu_layers!r}: expected "auto" or a number')
        self.model_path = os.fspath(model_path)
        self.set_seed(seed)
        self._params: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_batch": n_batch,
            "n_threads": n_threads or 0,
            "type_k": "f16" if type_k is None else type_k,
            "type_v": "f16" if type_v is None else type_v,
        }
        progress = hub.progress_bar("loading") if verbose else None
        try:
            self._model = Model(
                model_path,
                backend=backend,
                n_gpu_layers=-1 if isinstance(n_gpu_layers, str) else n_gpu_layers,
                n_cpu_moe=n_cpu_moe,
                use_mmap=use_mmap,
                progress=progress,
                session=self._params,
            )
        finally:
            if progress is not None:
                progress(1.0)  # takes the bar away
        self.info: ModelInfo = self._model.info
        self.sampling = self.info.sampling  # of answers that do not say otherwise
        self._params["n_ctx"] = min(n_ctx, self.info.context_length) if n_ctx > 0 else n_ctx
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lazy = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._session = self.session()

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str = "*.gguf",
        *,
        local_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> DiffusionGemma:
        """Downloads a file of a Hugging Face repository, or finds it in the cache, and loads it.

        `filename` may be a pattern such as "*Q4_K_M.gguf"; of a file in shards, all are fetched.
        Needs the extra `hub`. The other arguments are those of the class.
        """
        return cls(hub.download(repo_id, filename, local_dir, cache_dir), **kwargs)

    # ---- Text and tokens -------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer, built when it is first needed."""
        with self._lazy:
            if self._tokenizer is None:
                tokenizer = Tokenizer(self._model.file.keys)
                if len(tokenizer) != self.info.n_vocab:
                    raise ModelFileError(
                        f"the tokenizer has {len(tokenizer)} tokens, "
                        f"but the embedding has {self.info.n_vocab} rows"
                    )
                self._tokenizer = tokenizer
            return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The file's chat template, or Gemma 4's where it has none."""
        with self._lazy:
            if self._template is None:
                self._template = ChatTemplate(self._model.file.keys)
            return self._template

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's metadata, decoded as it is asked for."""
        return self._model.file.keys

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
        return self._session.n_ctx

    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.info.n_vocab

    def n_embd(self) -> int:
        """Width of the residual stream."""
        return self.info.n_embd

    def token_bos(self) -> int:
        """Id of the begin token; -1 where there is none."""
        return -1 if self.tokenizer.bos is None else self.tokenizer.bos

    def token_eos(self) -> int:
        """Id of the first of the tokens that end an answer."""
        return self.info.end_tokens[0]

    # ---- Answers ---------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, *, max_tokens: int | None = None, **options: Any
    ) -> Generated:
        """Continues a prompt, a text or token ids, and returns the whole answer.

        Options: `seed`, `stop`, `temperature`, the fields of `Sampling`, `noise` (recorded draws),
        `pinned` and `start` (see `Options`), and `session`, another one than the model's own.
        """
        answer = self.answer(prompt, max_tokens=max_tokens, **options)
        for _ in answer:
            pass
        return answer.result

    def stream(
        self, prompt: Prompt, *, max_tokens: int | None = None, **options: Any
    ) -> Iterator[Draft | Commit]:
        """Continues a prompt: a Draft after every denoising step, a Commit after every canvas."""
        return iter(self.answer(prompt, max_tokens=max_tokens, **options))

    def answer(
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Answer:
        """An answer that is made while it is iterated over, with its figures; see `generate`."""
        made = make_options(self.sampling, seed=self.seed if seed is None else seed, **options)
        ids = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        return Answer(session or self._session, self.info, self.tokenizer, ids, made)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt: begin token first, control tokens recognised."""
        return self.tokenizer.encode(prompt, add_bos=self.tokenizer.add_bos)

    def infill(self, prefix: str, suffix: str, *, n_tokens: int, **options: Any) -> str:
        """The text of a gap of `n_tokens` tokens between a prefix and a suffix.

        The suffix is pinned on the canvas behind the gap, as far as it fits; the gap must leave
        room for some of it. This goes beyond what the model was trained for. Options: those of
        `generate`, but `max_tokens`, `pinned` and `noise`.
        """
        length = self.info.canvas_length
        if not 1 <= n_tokens < length:
            raise ValueError(
                f"n_tokens is {n_tokens}: a gap and some of the suffix must fit "
                f"a canvas of {length} tokens"
            )
        after = self.tokenizer.encode(suffix, special=False)[: length - n_tokens]
        pinned = {n_tokens + i: token for i, token in enumerate(after)}
        return self.generate(prefix, max_tokens=n_tokens, pinned=pinned, **options).text

    def create_completion(self, prompt: Prompt, **options: Any) -> Any:
        """Continues a prompt in the dictionaries of the OpenAI API, as llama-cpp-python does.

        Options: `max_tokens` (16), `echo`, `stop`, `seed`, `suffix` (fills a gap of `max_tokens`
        tokens before it), `model`, and those of `generate`. `stream=True` returns an iterator of
        chunks. What has no meaning for a canvas raises ValueError.
        """
        stream = bool(options.pop("stream", False))
        completion = Completion(self, prompt, **options)
        return completion.chunks() if stream else completion.whole()

    __call__ = create_completion

    def create_chat_completion(self, messages: Sequence[Message], **options: Any) -> Any:
        """Answers a conversation in the dictionaries of the OpenAI API.

        Options: `tools`, `tool_choice`, `response_format`, `enable_thinking`, `max_tokens`, `stop`,
        `seed`, `model`, and those of `generate`. `stream=True` returns an iterator of chunks.
        Thoughts come as `reasoning_content`, calls as `tool_calls`; neither is ever part of
        `content`. With a `response_format` of JSON the text is checked and repaired before it is
        given out: ResponseFormatError where that fails.
        """
        stream = bool(options.pop("stream", False))
        completion = ChatCompletion(self, messages, **options)
        return completion.chunks() if stream else completion.whole()

    def embed(self, *_: object, **__: object) -> Any:
        """Refused: the model writes text, and was not trained to describe any as a vector."""
        raise NotImplementedError(
            "DiffusionGemma gives no embeddings: it was trained to write text. "
            "Use a model that was made for them"
        )

    create_embedding = embed

    # ---- Sessions, and the end -------------------------------------------------------------------

    def gpu_plan(self) -> GpuPlan | None:
        """What this model and its default session hold on the GPU; None on the CPU."""
        if self.info.backend != "cuda":
            return None
        split = {"n_gpu_layers": self.info.n_gpu_layers, "n_cpu_moe": self.info.n_cpu_moe}
        return self._model.gpu_plan(**split, **self._params)

    def session(self, **params: Any) -> Session:
        """Another conversation over the same weights; `params` override the constructor's."""
        session = Session(self._model, **{**self._params, **params})
        self._sessions.add(session)
        return session

    def memory(self, **params: Any) -> Memory:
        """Bytes that a session takes; `params` override the constructor's."""
        return self._model.memory(**{**self._params, **params})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation's cache to a file."""
        self._session.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads a cache that `save` wrote for the same model and cache types."""
        self._session.load(path)

    def save_state(self) -> bytes:
        """The conversation's cache, as `save` writes it, in memory."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "session")
            self._session.save(path)
            with open(path, "rb") as file:
                return file.read()

    def load_state(self, state: bytes) -> None:
        """Takes back a cache that `save_state` gave."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "session")
            with open(path, "wb") as file:
                file.write(state)
            self._session.load(path)

    def reset(self) -> None:
        """Forgets the conversation."""
        self._session.truncate(0)

    def set_seed(self, seed: int | None) -> None:
        """Seed of the answers that name none.

        None, and llama.cpp's spellings of it, -1 and 2**32 - 1, are a new one each time.
        """
        self.seed = None if seed in (-1, 2**32 - 1) else seed

    def cancel(self) -> None:
        """Ends the answer that is being made, with CancelledError; any thread may call it."""
        self._session.cancel()

    @property
    def default_session(self) -> Session:
        """The session that answers use when they name no other."""
        return self._session

    def close(self) -> None:
        """Cancels what runs and gives the memory back; twice is no error."""
        for session in list(self._sessions):
            session.close()
        self._model.close()

    def __enter__(self) -> DiffusionGemma:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


__all__ = ["DiffusionGemma", "JsonObject"]
