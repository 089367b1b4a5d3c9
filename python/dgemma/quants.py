"""Tensor types of GGUF: described, encoded and decoded by the engine's own code."""

from ._native.types import dequantize, quantize, type_info
from .values import TypeInfo

__all__ = ["TypeInfo", "dequantize", "quantize", "type_info"]
