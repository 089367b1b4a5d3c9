"""Run DiffusionGemma, a block text-diffusion language model, from a GGUF file.

llm = dgemma.DiffusionGemma("model.gguf")
print(llm.generate("Why is the sky blue?", max_tokens=256, seed=0).text)
"""

from ._native import File, Session, version
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
from .values import CanvasNoise, Memory, ModelInfo, Recorded, Sampling

__version__ = version()

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
    "Recorded",
    "ResponseFormatError",
    "Sampling",
    "Session",
    "Stats",
]
