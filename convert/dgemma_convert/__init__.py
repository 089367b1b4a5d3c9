"""Converts DiffusionGemma checkpoints to GGUF."""

from .conversion import Report, convert
from .errors import ConvertError
from .requantize import quantize

__all__ = ["ConvertError", "Report", "convert", "quantize"]
