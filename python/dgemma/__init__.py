"""Run DiffusionGemma, a block text-diffusion language model, from a GGUF file.

llm = dgemma.DiffusionGemma("model.gguf")
print(llm.generate("Why is the sky blue?", max_tokens=256, seed=0).text)
"""

from __future__ import annotations

# Nothing is imported here: until the command line is there, Ctrl-C is a traceback of Python's.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ._native import File, Session
    from .errors import (
        BackendError,
        CancelledError,
        ChatTemplateError,
        ContextLengthError,
        Error,
        FileAccessError,
        IgnoredOptionWarning,
        ModelFileError,
        OptionError,
        OutOfMemoryError,
        ResponseFormatError,
    )
    from .generation.events import Commit, Draft, Generated, Stats
    from .model import DiffusionGemma
    from .values import CanvasNoise, Memory, ModelInfo, ReplayedDraws, Sampling

    __version__: str

# Modules are loaded when something of them is asked for: the command line can be interrupted from
# its first moment, and a program that only reads a file needs no tokenizer.
_MODULES = {
    "_native": ("File", "Session"),
    "errors": (
        *("BackendError", "CancelledError", "ChatTemplateError", "ContextLengthError", "Error"),
        *("FileAccessError", "IgnoredOptionWarning", "ModelFileError", "OptionError"),
        *("OutOfMemoryError", "ResponseFormatError"),
    ),
    "generation.events": ("Commit", "Draft", "Generated", "Stats"),
    "model": ("DiffusionGemma",),
    "values": ("CanvasNoise", "Memory", "ModelInfo", "ReplayedDraws", "Sampling"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        return importlib.import_module("._native", __name__).version()
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _PLACES:
        value = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    else:
        try:
            value = importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as problem:
            if problem.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


__all__ = [
    "BackendError",
    "CancelledError",
    "CanvasNoise",
    "ChatTemplateError",
    "Commit",
    "ContextLengthError",
    "DiffusionGemma",
    "Draft",
    "Error",
    "File",
    "FileAccessError",
    "Generated",
    "IgnoredOptionWarning",
    "Memory",
    "ModelFileError",
    "ModelInfo",
    "OptionError",
    "OutOfMemoryError",
    "ReplayedDraws",
    "ResponseFormatError",
    "Sampling",
    "Session",
    "Stats",
]
