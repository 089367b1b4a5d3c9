"""GGUF files, checked and mapped read-only: metadata as Python values, tensors as views."""

from ._native.file import File, Keys
from ._native.model import check_model as check
from .values import Tensor

__all__ = ["File", "Keys", "Tensor", "check"]
