"""Converts DiffusionGemma checkpoints to GGUF."""

from .conversion import convert
from .errors import ConvertError
from .production import Report
from .requantize import quantize

__all__ = ["ConvertError", "Report", "convert", "quantize"]
