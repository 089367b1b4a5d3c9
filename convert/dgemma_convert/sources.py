"""Tensors as the converter sees them: a stack of matrices that can be read row by row.

A vector is one matrix of one row. The experts of a layer are a stack; everything else is a single
matrix. Whatever form a checkpoint has (sharded, fused, quantized), it is brought to this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .policy import Type, row_bytes
from .safetensors_file import StoredTensor

Bytes = NDArray[np.uint8]

# How each float type of a checkpoint is handed on; float64 is rounded to float32.
DTYPES = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16, "F64": Type.F32}


@dataclass(frozen=True)
class LeftOut:
    """What the checkpoint has and the file will not have."""

    what: str
    n_tensors: int
    n_bytes: int
    names: tuple[str, ...] = ()  # where there are few, and they are not obvious

    @classmethod
    def of(cls, what: str, stored: Sequence[StoredTensor], *, named: bool = True) -> LeftOut:
        """That of some stored tensors."""
        names = tuple(tensor.name for tensor in stored) if named else ()
        return cls(what, len(stored), sum(tensor.n_bytes for tensor in stored), names)


class Source(Protocol):
    """Where a tensor's values come from."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def type(self) -> Type:
        """The encoding of the bytes that `read` returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""

    @property
    def multipliers(self) -> NDArray[np.float32] | None:
        """A factor for each matrix, (n_matrices), which `read` does not apply; or None: all 1."""

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) of one matrix."""


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(n_matrices, n_rows, n_cols) of a shape with up to three dimensions."""
    return (1,) * (3 - len(shape)) + shape  # type: ignore[return-value]


@dataclass(frozen=True)
class PlainSource:
    """A float tensor of a checkpoint."""

    stored: StoredTensor
    multipliers: None = None

    @property
    def name(self) -> str:
        """As in the checkpoint."""
        return self.stored.name

    @property
    def type(self) -> Type:
        """The stored type; ConvertError where it is not a float type."""
        if self.stored.dtype not in DTYPES:
            raise ConvertError(
                f"tensor {self.name} has the data type {self.stored.dtype}; expected one of "
                f"{' '.join(DTYPES)}, or scales beside it that say how it is quantized"
            )
        return DTYPES[self.stored.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.stored.shape

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) of one matrix."""
        _, n_rows, n_cols = matrices(self.shape)
        wide = self.stored.dtype == "F64"
        stride = 8 * n_cols if wide else row_bytes(self.type, n_cols)
        data = self.stored.read((matrix * n_rows + first) * stride, n * stride)
        return _rounded(data).view(np.uint8) if wide else data


@dataclass(frozen=True)
class RowSlice:
    """Rows [first_row, first_row + n_rows) of each matrix of `source`."""

    source: Source
    first_row: int
    n_rows: int

    @property
    def name(self) -> str:
        """That of the whole."""
        return self.source.name

    @property
    def type(self) -> Type:
        """That of the whole."""
        return self.source.type

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        *outer, _, n_cols = self.source.shape
        return (*outer, self.n_rows, n_cols)

    @property
    def multipliers(self) -> NDArray[np.float32] | None:
        """Those of the whole."""
        return self.source.multipliers

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) of one matrix."""
        return self.source.read(matrix, self.first_row + first, n)


@dataclass(frozen=True)
class Stack:
    """Single matrices of one shape and type, one behind the other."""

    name: str
    parts: tuple[Source, ...]

    @property
    def type(self) -> Type:
        """That of all parts."""
        return self.parts[0].type

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_parts, n_rows, n_cols)."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def multipliers(self) -> NDArray[np.float32] | None:
        """Those of the parts."""
        if self.parts[0].multipliers is None:
            return None
        return np.concatenate(
            [part.multipliers for part in self.parts if part.multipliers is not None]
        )

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) of one part."""
        return self.parts[matrix].read(0, first, n)


@dataclass(frozen=True)
class ArraySource:
    """A small float32 tensor that is in memory."""

    name: str
    values: NDArray[np.float32]
    type: Type = Type.F32
    multipliers: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.values.shape

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) of one matrix."""
        flat = self.values.reshape(matrices(self.shape))
        return np.ascontiguousarray(flat[matrix, first : first + n]).view(np.uint8).reshape(-1)


def _rounded(data: Bytes) -> NDArray[np.float32]:
    """The float32 of float64; what is too large becomes infinite, and is refused later."""
    with np.errstate(over="ignore"):
        return data.view(np.float64).astype(np.float32)


def same_bytes(a: StoredTensor, b: StoredTensor, step: int = 16 << 20) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(
        np.array_equal(a.read(i, min(step, a.n_bytes - i)), b.read(i, min(step, a.n_bytes - i)))
        for i in range(0, a.n_bytes, step)
    )


def read_floats(tensor: StoredTensor) -> NDArray[np.float32]:
    """All values of a small float tensor; ConvertError where it is of another type."""
    raw = tensor.read(0, tensor.n_bytes)
    if tensor.dtype == "F32":
        values = raw.view(np.float32)
    elif tensor.dtype == "BF16":
        values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif tensor.dtype == "F16":
        values = raw.view(np.float16).astype(np.float32)
    elif tensor.dtype == "F64":
        values = _rounded(raw)
    else:
        raise ConvertError(
            f"tensor {tensor.name} has the type {tensor.dtype}; expected a float type"
        )
    return values.reshape(tensor.shape)


def n_elements(shape: tuple[int, ...]) -> int:
    """Product of the dimensions."""
    return math.prod(shape)
