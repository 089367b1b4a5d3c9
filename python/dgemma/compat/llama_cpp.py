"""The module `llama_cpp`, as far as programs and LangChain's two classes need it.

from dgemma.compat import llama_cpp; llama_cpp.install()  # from now on `import llama_cpp` finds it
"""

from __future__ import annotations

import os
import sys
from typing import Any

from .._native import version
from ..errors import OptionValueError
from ..model import DiffusionGemma

__version__ = version()
Llama = DiffusionGemma
LlamaState = bytes
"""What `save_state` gives."""


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


def install() -> None:
    """Makes `import llama_cpp` find this module; ImportError where the other one is loaded."""
    loaded = sys.modules.get("llama_cpp")
    if loaded is not None and loaded is not sys.modules[__name__]:
        raise ImportError("llama_cpp is loaded already: call install() before it is imported")
    sys.modules["llama_cpp"] = sys.modules[__name__]
