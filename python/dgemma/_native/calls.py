"""The library itself: statuses become exceptions, callbacks and buffers find their way."""

from __future__ import annotations

import _thread
import operator
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from .._dgemma import ffi, lib
from ..errors import (
    BackendError,
    CancelledError,
    ContextLengthError,
    Error,
    FileAccessError,
    ModelFileError,
    OptionTypeError,
    OptionValueError,
    OutOfMemoryError,
)
from ..values import BackendCheck, GpuInfo, Limits, Progress

PathLike = str | os.PathLike[str]

RELEASE = "0.1.0"
"""Of this Python code, which must be that of the compiled part."""


def check_release(compiled: str, python: str = RELEASE) -> None:
    """ImportError where the compiled part is of another release than the Python code."""
    if compiled != python:
        raise ImportError(
            f"the Python part of dgemma is of release {python}, its compiled part of {compiled}: "
            "install dgemma again (pip install --force-reinstall dgemma)"
        )


check_release(str(ffi.string(lib.dg_version()).decode()))

MAX_THREADS = int(lib.DG_MAX_THREADS)
MAX_GPUS = int(lib.DG_MAX_GPUS)
MAX_DENOISING_STEPS = int(lib.DG_MAX_DENOISING_STEPS)
MAX_STABILITY_THRESHOLD = int(lib.DG_MAX_STABILITY_THRESHOLD)

_EXCEPTIONS: dict[int, type[Exception]] = {
    lib.DG_ERROR_ARGUMENT: OptionValueError,
    lib.DG_ERROR_MODEL_FILE: ModelFileError,
    lib.DG_ERROR_CONTEXT_LENGTH: ContextLengthError,
    lib.DG_ERROR_OUT_OF_MEMORY: OutOfMemoryError,
    lib.DG_ERROR_BACKEND: BackendError,
    lib.DG_ERROR_CANCELLED: CancelledError,
    lib.DG_ERROR_IO: FileAccessError,
}


def check(status: int, error: Any) -> None:
    """Raises what a status stands for, with the text of its dg_error."""
    if status != lib.DG_OK:
        text = ffi.string(error.message).decode("utf-8", "replace")
        raise _EXCEPTIONS.get(status, Error)(text or f"the engine failed with status {status}")


def version() -> str:
    """Version of the engine, "major.minor.patch"."""
    return str(ffi.string(lib.dg_version()).decode())


def int32(name: str, value: Any) -> int:
    """A number that fits C's int32_t; OptionTypeError and OptionValueError otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        raise OptionTypeError(f"{name} must be a whole number, not {value!r}", param=name) from None
    if not -(2**31) <= number < 2**31:
        raise OptionValueError(f"{name} is {number}: it does not fit 32 bits", param=name)
    return number


def c_path(path: PathLike) -> bytes:
    """A path as C takes it; ValueError where it holds a zero byte, at which C would cut it off."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise OptionValueError(
            f"the path {os.fspath(path)!r} holds a zero byte: no file has such a name"
        )
    return encoded


def copied(pointer: Any, n: int, kind: type[Any]) -> npt.NDArray[Any]:
    """A copy of `n` elements of type `kind` at `pointer`."""
    if n == 0:
        return np.zeros(0, kind)
    view = np.frombuffer(ffi.buffer(pointer, n * np.dtype(kind).itemsize), kind)
    return np.array(view)


class Call:
    """One long call: passes progress on, and carries an exception across the C frames.

    Python handles signals only between its own instructions, so the callback is installed even
    where nobody asked for progress: Ctrl-C then ends a long prefill.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.raised: BaseException | None = None
        self.handle = ffi.new_handle(self)

    def check(self, status: int, error: Any) -> None:
        """Raises what the callback raised, or else what the status stands for."""
        if self.raised is not None:
            raise self.raised
        check(status, error)


def _on_error(kind: type[BaseException], problem: BaseException, trace: Any) -> None:
    """Takes what was raised before dgemma_progress could, Ctrl-C for one: cffi would print it."""
    user = trace.tb_frame.f_locals.get("user") if trace is not None else None
    if user is None:
        _thread.interrupt_main()
    else:
        ffi.from_handle(user).raised = problem


@ffi.def_extern(error=False, onerror=_on_error)  # type: ignore[untyped-decorator]
def dgemma_progress(done: float, user: Any) -> bool:
    """Called by the engine; False ends the call that is running."""
    call: Call = ffi.from_handle(user)
    try:
        return call.progress is None or call.progress(done) is not False
    except BaseException as problem:
        call.raised = problem
        return False


def backend_check(name: str) -> BackendCheck:
    """What a backend, "cpu" or "cuda", would run on; BackendError says why it cannot."""
    info, error = ffi.new("dg_backend_info *"), ffi.new("dg_error *")
    info.size = ffi.sizeof("dg_backend_info")
    kinds = {"cpu": lib.DG_BACKEND_CPU, "cuda": lib.DG_BACKEND_CUDA}
    check(lib.dg_backend_check(kinds[name], info, error), error)
    text = ffi.string(info.name).decode()
    return BackendCheck(text, int(info.free_bytes), int(info.total_bytes))


def list_gpus() -> list[GpuInfo]:
    """The GPUs that CUDA shows, usable or not; BackendError says why there are none."""
    gpus, n, error = ffi.new("dg_gpu_info[]", MAX_GPUS), ffi.new("int32_t *"), ffi.new("dg_error *")
    check(lib.dg_list_gpus(gpus, MAX_GPUS, n, error), error)
    return [
        GpuInfo(
            number=gpu.number,
            name=ffi.string(gpu.name).decode("utf-8", "replace"),
            uuid=ffi.string(gpu.uuid).decode(),
            capability=f"{gpu.capability // 10}.{gpu.capability % 10}",
            free_bytes=int(gpu.free_bytes),
            total_bytes=int(gpu.total_bytes),
            obstacle=ffi.string(gpu.obstacle).decode("utf-8", "replace"),
        )
        for gpu in gpus[0 : n[0]]
    ]


def measure_limits(n_threads: int = 0) -> Limits:
    """Measures this machine's limits; takes about a second."""
    limits, error = ffi.new("dg_limits *"), ffi.new("dg_error *")
    check(lib.dg_measure_limits(int32("n_threads", n_threads), limits, error), error)
    return Limits(
        limits.read_gb_per_s,
        limits.int8_gop_per_s,
        limits.bf16_gflop_per_s,
        limits.f32_gflop_per_s,
    )
