"""Tensor types: describe, encode, decode."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._dgemma import ffi, lib
from ..values import ByteArray, FloatArray, TypeInfo
from .calls import check


def type_info(type: int | str) -> TypeInfo:
    """Describes a tensor type, given by number or by name ("q4_0")."""
    number = type
    if isinstance(type, str):
        known = {name: n for n, name in ffi.typeof("dg_type").elements.items()}
        name = f"DG_TYPE_{type.upper()}"
        if name not in known:
            names = " ".join(sorted(n.removeprefix("DG_TYPE_").lower() for n in known))
            raise ValueError(f"unknown tensor type {type!r}: expected one of {names}")
        number = known[name]
    info, error = ffi.new("dg_type_info *"), ffi.new("dg_error *")
    check(lib.dg_type_describe(number, info, error), error)
    return TypeInfo(
        id=int(number),
        name=ffi.string(info.name).decode(),
        block_size=info.block_size,
        block_bytes=info.block_bytes,
        encodes=info.encodes,
        decodes=info.decodes,
    )


def _source(data: Any, type: TypeInfo, n_rows: int, n_cols: int) -> Any:
    """Pointer to `data`, after checking that it holds a tensor of that type and size."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data)
    pointer = ffi.from_buffer(data)
    actual, expected = len(ffi.buffer(pointer)), type.n_bytes(n_rows, n_cols)
    if actual != expected:
        raise ValueError(
            f"{n_rows} x {n_cols} elements of type {type.name} take {expected} bytes, "
            f"but the source has {actual}"
        )
    return pointer


def quantize(
    src: Any,
    src_type: int | str,
    dst_type: int | str,
    n_rows: int,
    n_cols: int,
    importance: npt.ArrayLike | None = None,
    with_multiplier: bool = False,
    threads: int = 0,
) -> tuple[ByteArray, float]:
    """Re-encodes `src`, a buffer that holds (n_rows, n_cols) of `src_type`, as `dst_type`.

    `importance` (n_cols,): weight of each column's squared error. `with_multiplier`: NVFP4 may
    choose the tensor's float32 multiplier, which is the second result (1.0 otherwise). `threads`:
    0 is one a physical core; the result does not depend on it.
    """
    source, target = type_info(src_type), type_info(dst_type)
    pointer = _source(src, source, n_rows, n_cols)
    out = np.empty(target.n_bytes(n_rows, n_cols), np.uint8)
    weights = ffi.NULL
    if importance is not None:
        weight_array = np.ascontiguousarray(importance, np.float32)
        if weight_array.shape != (n_cols,):
            raise ValueError(f"importance must have shape ({n_cols},), not {weight_array.shape}")
        weights = ffi.from_buffer("float[]", weight_array)
    multiplier = ffi.new("float *", 1.0)
    error = ffi.new("dg_error *")
    status = lib.dg_quantize(
        source.id,
        pointer,
        target.id,
        ffi.from_buffer(out),
        n_rows,
        n_cols,
        weights,
        multiplier if with_multiplier else ffi.NULL,
        threads,
        error,
    )
    check(status, error)
    return out, float(multiplier[0])


def dequantize(src: Any, type: int | str, n_rows: int, n_cols: int, threads: int = 0) -> FloatArray:
    """Decodes a buffer of (n_rows, n_cols) elements; an NVFP4 multiplier is not applied."""
    source = type_info(type)
    out = np.empty((n_rows, n_cols), np.float32)
    error = ffi.new("dg_error *")
    status = lib.dg_dequantize(
        source.id,
        _source(src, source, n_rows, n_cols),
        ffi.from_buffer("float[]", out),
        n_rows,
        n_cols,
        threads,
        error,
    )
    check(status, error)
    return out
