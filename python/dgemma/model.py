"""`DiffusionGemma`: a model file, and everything that can be asked of it."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from . import hub
from ._native import MAX_THREADS, Model, Session
from .chat.template import ChatTemplate
from .compat.llama import LlamaMethods
from .compat.llama_arguments import check_constructor, device_of
from .compat.requests import AnswerOptions, accept, warn_once
from .errors import ModelFileError, OptionTypeError, OptionValueError
from .generation.choices import Choices
from .generation.events import Commit, Draft, Generated
from .generation.generate import Answer, check_length
from .generation.options import make_options
from .generation.structured import Form
from .progress import progress_bar
from .tokenizer import Tokenizer
from .values import GpuPlan, Ids, Memory, ModelInfo

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._native import SessionParams
    from .compat.llama_arguments import LlamaArguments

Prompt: TypeAlias = str | Ids


def _split_text(tensor_split: str | Sequence[float] | None) -> str | None:
    if tensor_split is None or isinstance(tensor_split, str):
        return tensor_split
    return ",".join(str(float(proportion)) for proportion in tensor_split)


class DiffusionGemma(LlamaMethods):
    """A loaded model with one conversation's cache; more of these come from `session`.

    Args:
        model_path: the GGUF file, or the first of its shards.
        n_ctx: tokens of context, at most what the model was trained for; 0: all of that.
        n_batch: prompt tokens encoded at a time.
        n_threads: None: one a physical core.
        n_gpu_layers: how many layers, the last ones, the GPU keeps; "auto": as many as fit.
        n_cpu_moe: the experts of the last so many layers stay on the CPU; "auto" may add more.
        backend: "auto", "cpu" or "cuda".
        device: which GPU: its number as `dgemma doctor` lists it, its uuid, or a part of its name;
            several, separated by commas; "none": the CPU. None: the one with the most free memory,
            and where the model does not fit it, all of them.
        tensor_split: how layers are divided over several GPUs: proportions such as [3, 1] or "3,1",
            or "auto", by what is free. None: over the fewest.
        type_k, type_v: type of the cache: "f32", "f16", "bf16" or "q8_0".
        use_mmap: False reads the file into memory.
        seed: for every answer that names none; None: a new one each time.
        strict: arguments and options without effect are errors, not warnings.
        verbose: show the progress of loading on standard error.
        warn_of_unused_gpu: warn where `n_gpu_layers` or `n_cpu_moe` have no effect.

    The other arguments of llama-cpp-python's `Llama` are known: what changes nothing here is named
    once in a warning, and what would make answers other than they seem is refused with a reason.

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
        device: str | int | None = None,
        tensor_split: str | Sequence[float] | None = None,
        type_k: int | str | None = "f16",
        type_v: int | str | None = "f16",
        use_mmap: bool = True,
        seed: int | None = None,
        strict: bool = False,
        verbose: bool = False,
        warn_of_unused_gpu: bool = True,
        **others: Unpack[LlamaArguments],
    ) -> None:
        self.strict = strict
        warn_once(check_constructor(others, strict=strict), stacklevel=3)
        self.chat_handler = others.get("chat_handler")
        self.chat_format = others.get("chat_format")
        if isinstance(n_gpu_layers, str) and n_gpu_layers != "auto":
            raise OptionValueError(
                f'n_gpu_layers is {n_gpu_layers!r}: expected "auto" or a number',
                param="n_gpu_layers",
            )
        if not 0 <= (n_threads or 0) <= MAX_THREADS:
            raise OptionValueError(
                f"n_threads is {n_threads}: expected at most {MAX_THREADS}, or 0 for one a "
                "physical core",
                param="n_threads",
            )
        if device is None:
            device, complaints = device_of(others)
            warn_once(complaints, stacklevel=3)
        self.model_path = os.fspath(model_path)
        self.verbose = verbose
        self.set_seed(seed)
        self._params: SessionParams = {
            "n_ctx": n_ctx,
            "n_batch": n_batch,
            "n_threads": n_threads or 0,
            "type_k": "f16" if type_k is None else type_k,
            "type_v": "f16" if type_v is None else type_v,
        }
        with progress_bar("loading", enabled=verbose) as progress:
            self._model = Model(
                model_path,
                backend=backend,
                n_gpu_layers=-1 if isinstance(n_gpu_layers, str) else n_gpu_layers,
                n_cpu_moe=n_cpu_moe,
                device=None if device is None else str(device),
                tensor_split=_split_text(tensor_split),
                use_mmap=use_mmap,
                progress=progress.share,
                session=self._params,
            )
        self.info: ModelInfo = self._model.info
        if warn_of_unused_gpu:
            self._warn_of_unused_gpu(n_gpu_layers, n_cpu_moe, tensor_split)
        self.sampling = self.info.sampling  # of answers that do not say otherwise
        self._params["n_ctx"] = min(n_ctx, self.info.context_length) if n_ctx > 0 else n_ctx
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lazy = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._session = self.session()

    def _warn_of_unused_gpu(
        self, n_gpu_layers: int | str, n_cpu_moe: int, tensor_split: object
    ) -> None:
        asked = {
            "n_gpu_layers": n_gpu_layers if isinstance(n_gpu_layers, int) else 0,
            "n_cpu_moe": n_cpu_moe,
            "tensor_split": tensor_split,
        }
        without_effect = [f"{name}={value!r}" for name, value in asked.items() if value]
        if self.info.backend != "cpu" or not without_effect:
            return
        reason = (
            self.info.backend_note
            or 'the CPU was asked for, or no GPU is there (see "dgemma doctor")'
        )
        warnings.warn(f"{without_effect[0]} has no effect: {reason}", RuntimeWarning, stacklevel=3)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None = None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        **kwargs: Any,
    ) -> DiffusionGemma:
        """Downloads a file of a Hugging Face repository, or finds it in the cache, and loads it.

        `filename` may be a pattern such as "*Q4_K_M.gguf"; where several files fit it, ValueError
        lists them. Of a file in shards, all are fetched. `additional_files` are fetched beside it.
        Needs the extra `hub`. The other arguments are those of the class.
        `local_dir_use_symlinks` is there for llama-cpp-python's sake: files are never linked.
        """
        path = hub.download(
            repo_id,
            filename or "*.gguf",
            local_dir=local_dir,
            cache_dir=cache_dir,
            revision=revision,
            additional_files=additional_files or (),
        )
        return cls(path, **kwargs)

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

    # ---- Answers ---------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **options: Unpack[AnswerOptions]) -> Generated:
        """Continues a prompt, a text or token ids, and returns the whole answer.

        Options without a meaning for a canvas (`top_p` and its like) are named once in a warning.
        """
        answer = self.answer(prompt, **options)
        for _ in answer:
            pass
        return answer.result

    def stream(self, prompt: Prompt, **options: Unpack[AnswerOptions]) -> Iterator[Draft | Commit]:
        """Continues a prompt: a Draft after every denoising step, a Commit after every canvas.

        A stream that is left half-read ends where another answer is asked of its session.
        """
        return iter(self.answer(prompt, **options))

    def answer(self, prompt: Prompt, **options: Unpack[AnswerOptions]) -> Answer:
        """An answer that is made while it is iterated over, with its figures; see `generate`."""
        strict = options.pop("strict", None)
        accepted = accept(options, AnswerOptions, strict=self.strict if strict is None else strict)
        warn_once(accepted.warnings, stacklevel=4)
        return self.choices([prompt], **accepted.options).answers[0]

    def choices(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        form: Form | None = None,
        session: Session | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Choices:
        """`n` answers to each of several prompts; `options` are those of `generate`."""
        made = make_options(
            self.sampling, seed=self.seed if seed is None else seed, form=form, **options
        )
        for prompt in prompts:
            if isinstance(prompt, str):
                self.check_text_length(prompt, session)
        ids = [self.encode_prompt(p) if isinstance(p, str) else p for p in prompts]
        if session is not None and not isinstance(session, Session):
            raise OptionTypeError("session must be one that `session()` gave", param="session")
        return Choices(session or self._session, self.info, self.tokenizer, ids, made, n)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt: begin token first, control tokens recognised."""
        return self.tokenizer.encode(prompt, add_bos=self.tokenizer.add_bos)

    def check_text_length(self, text: str, session: Session | None = None) -> None:
        """Raises ContextLengthError for a text that cannot fit, without encoding it.

        A token stands for a bounded number of bytes, so that many bytes are many tokens.
        """
        n_ctx = (session or self._session).n_ctx
        n_tokens = -(-len(text) // self.tokenizer.max_token_bytes)  # a character is a byte or more
        check_length(n_tokens, self.info.canvas_length, n_ctx, at_least=True)

    def infill(
        self, prefix: str, suffix: str, *, n_tokens: int, **options: Unpack[AnswerOptions]
    ) -> str:
        """The text of a gap of `n_tokens` tokens between a prefix and a suffix.

        The suffix is pinned on the canvas behind the gap, as far as it fits; the gap must leave
        room for some of it. This goes beyond what the model was trained for. Options: those of
        `generate`, but `max_tokens`, `pinned` and `noise`.
        """
        length = self.info.canvas_length
        if not 1 <= n_tokens < length:
            raise OptionValueError(
                f"n_tokens is {n_tokens}: a gap and some of the suffix must fit "
                f"a canvas of {length} tokens",
                param="n_tokens",
            )
        after = self.tokenizer.encode_start(suffix, length - n_tokens)
        options["pinned"] = {n_tokens + i: token for i, token in enumerate(after)}
        options["max_tokens"] = n_tokens
        return self.generate(prefix, **options).text

    # ---- Sessions, and the end -------------------------------------------------------------------

    def gpu_plan(self) -> GpuPlan | None:
        """What this model and its default session hold on the GPU; None on the CPU."""
        if self.info.backend != "cuda":
            return None
        layers = self.info.gpu_layers
        return self._model.gpu_plan(
            [0] * len(layers),
            self.info.n_gpu_layers,
            self.info.n_cpu_moe,
            layers if len(layers) > 1 else (),
            **self._params,
        )

    def session(self, **params: Unpack[SessionParams]) -> Session:
        """Another conversation over the same weights; `params` override the constructor's."""
        session = Session(self._model, **{**self._params, **params})
        self._sessions.add(session)
        return session

    def memory(self, **params: Unpack[SessionParams]) -> Memory:
        """Bytes that a session takes; `params` override the constructor's."""
        return self._model.memory(**{**self._params, **params})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation's cache to a file."""
        self._session.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads a cache that `save` wrote for the same model and cache types."""
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
