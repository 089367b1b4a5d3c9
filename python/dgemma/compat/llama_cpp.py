"""The module `llama_cpp`, as far as programs and LangChain's two classes need it.

from dgemma.compat import llama_cpp; llama_cpp.install()  # from now on `import llama_cpp` finds it
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .._native import version
from ..errors import OptionValueError
from ..generation.events import Commit
from ..model import DiffusionGemma, Prompt

__version__ = version()
LlamaState = bytes
"""What `save_state` gives."""

# What programs give as arguments, by llama.cpp's numbers.
LLAMA_DEFAULT_SEED = 0xFFFFFFFF
LLAMA_SPLIT_MODE_NONE, LLAMA_SPLIT_MODE_LAYER, LLAMA_SPLIT_MODE_ROW = 0, 1, 2
LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED = LLAMA_POOLING_TYPE_UNSPECIFIED = -1
LLAMA_ATTENTION_TYPE_UNSPECIFIED = -1
GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_BF16 = 0, 1, 8, 30

# The parameters of `generate` behind the first, in their order there.
GENERATE_ORDER = (
    *("top_k", "top_p", "min_p", "typical_p", "temp", "repeat_penalty", "reset"),
    *("frequency_penalty", "presence_penalty", "tfs_z", "mirostat_mode", "mirostat_tau"),
    *("mirostat_eta", "penalize_nl", "logits_processor", "stopping_criteria", "grammar"),
)


class Llama(DiffusionGemma):
    """`DiffusionGemma` with the one method whose name means something else there."""

    def generate(self, prompt: Prompt, *positional: Any, **options: Any) -> Any:
        """The answer's token ids one by one, an end token last; of a text, as `DiffusionGemma`."""
        if isinstance(prompt, str):
            return super().generate(prompt, **options)
        given = self._arguments("generate", GENERATE_ORDER, positional, options)
        given.pop("reset", None)  # what is encoded already is found by comparing
        if "temp" in given:
            given["temperature"] = given.pop("temp")
        return self._token_ids(self.answer(prompt, **given))

    def _token_ids(self, answer: Any) -> Iterator[int]:
        for event in answer:
            if isinstance(event, Commit):
                yield from event.tokens
                if event.finish_reason == "stop":
                    yield self.token_eos()


class LogitsProcessorList(list[Callable[..., Any]]):
    """For `logits_processor`, which has no effect here."""


class StoppingCriteriaList(list[Callable[..., bool]]):
    """For `stopping_criteria`, which are refused: use `stop`."""


class LlamaGrammar:
    """Refused: a canvas settles everywhere at once, and no grammar can steer it token by token."""

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> Any:
        """Raises OptionValueError."""
        raise OptionValueError(
            "grammar is not supported: ask for JSON with `response_format`, which is checked and "
            "repaired",
            param="grammar",
            code="unsupported_parameter",
        )

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> Any:
        """Raises OptionValueError."""
        return cls.from_string("")

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> Any:
        """Raises OptionValueError."""
        return cls.from_string("")


class LlamaRAMCache:
    """For `set_cache`, which does nothing here: every session keeps what it has encoded."""

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        self.capacity_bytes = capacity_bytes


LlamaCache = LlamaRAMCache


class LlamaDiskCache(LlamaRAMCache):
    """Likewise."""

    def __init__(
        self, cache_dir: str = ".cache/llama_cache", capacity_bytes: int = 2 << 30
    ) -> None:
        super().__init__(capacity_bytes)
        self.cache_dir = cache_dir


_PARTS = ("llama", "llama_cache", "llama_grammar")  # of the package there; all is here in one


def install() -> None:
    """Makes `import llama_cpp` find this module; ImportError where the other one is loaded."""
    loaded = sys.modules.get("llama_cpp")
    if loaded is not None and loaded is not sys.modules[__name__]:
        raise ImportError("llama_cpp is loaded already: call install() before it is imported")
    for name in ("llama_cpp", *(f"llama_cpp.{part}" for part in _PARTS)):
        sys.modules[name] = sys.modules[__name__]
