"""The only place that touches the C library: statuses become exceptions, pointers become views.

Calls into C run without the interpreter lock. Everything here may be closed at any time and from
any thread: memory is given back once the last view or call that uses it is gone.
"""

from .calls import (
    MAX_DENOISING_STEPS,
    MAX_GPUS,
    MAX_STABILITY_THRESHOLD,
    MAX_THREADS,
    backend_check,
    check_release,
    list_gpus,
    measure_limits,
    version,
)
from .file import File, Keys
from .model import Model, SessionParams, check_model
from .session import Session, token_ids
from .types import dequantize, quantize, type_info

__all__ = [
    "MAX_DENOISING_STEPS",
    "MAX_GPUS",
    "MAX_STABILITY_THRESHOLD",
    "MAX_THREADS",
    "File",
    "Keys",
    "Model",
    "Session",
    "SessionParams",
    "backend_check",
    "check_model",
    "check_release",
    "dequantize",
    "list_gpus",
    "measure_limits",
    "quantize",
    "token_ids",
    "type_info",
    "version",
]
