"""A strict reader of safetensors checkpoints that hands out raw bytes.

The format is a little-endian uint64 header length, a JSON header and the tensors' bytes. The
`safetensors` package reads it well, but through NumPy it has neither BF16 nor F8, and through torch
it would make the converter need torch. Reading slices of raw bytes is all that is needed here.
Plain reads rather than a mapping, because mapped pages count as resident memory, and because a file
that is cut short while it is mapped kills the process instead of raising an error.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError, from_os_error
from .json_file import check_content, check_regular

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library

# Bits of an element. Sub-byte types are packed.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `shape` is rows first, `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SafetensorsFile
    offset: int
    n_bytes: int

    def read(self, first: int, n: int) -> NDArray[np.uint8]:
        """Bytes [first, first + n) of the tensor's data."""
        return self.file.read(self.offset + first, n)


class SafetensorsFile:
    """One open file and its checked header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        check_regular(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise from_os_error(error, "opening") from error
        try:
            self._identity = self._stat()
            self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; safe to repeat."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, n: int) -> NDArray[np.uint8]:
        """Bytes [offset, offset + n) of the file."""
        buffer = np.empty(n, np.uint8)
        view, done = buffer.data, 0
        while done < n:
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                error.filename = str(self.path)
                raise from_os_error(error, "reading") from error
            if got == 0:
                raise ConvertError(f"{self.path}: ends early; it was cut short while being read")
            done += got
        return buffer

    def check_unchanged(self) -> None:
        """ConvertError where the file was written to or replaced since it was opened."""
        try:
            on_disk = os.stat(self.path)
        except OSError as error:
            raise from_os_error(error, "checking") from error
        if self._stat() != self._identity or on_disk.st_ino != os.fstat(self._fd).st_ino:
            raise ConvertError(f"{self.path}: changed while it was being converted; start again")

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def _read_header(self) -> None:
        size = self._identity[0]
        if size < 8:
            raise ConvertError(f"{self.path}: {size} bytes are no safetensors file")
        check_content(self.path, self.read(0, min(size, 100)).tobytes())
        n_header = int.from_bytes(self.read(0, 8).tobytes(), "little")
        if n_header > MAX_HEADER_BYTES:
            raise ConvertError(
                f"{self.path}: header of {n_header} bytes; at most {MAX_HEADER_BYTES} are allowed: "
                "it is damaged, or no safetensors file"
            )
        if n_header > size - 8:
            raise ConvertError(
                f"{self.path}: the header alone needs {n_header + 8} bytes, the file has {size}; "
                "download it again"
            )
        try:
            header = json.loads(self.read(8, n_header).tobytes(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ConvertError(f"{self.path}: damaged header: {error}") from error
        if not isinstance(header, dict):
            raise ConvertError(f"{self.path}: damaged header: not a JSON object")
        header.pop("__metadata__", None)

        data_offset = 8 + n_header
        for name, entry in header.items():
            self.tensors[name] = self._tensor(name, entry, data_offset, size - data_offset)

        end, previous = data_offset, ""
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.offset, t.n_bytes)):
            if tensor.offset < end:
                raise ConvertError(f"{self.path}: tensors {previous} and {tensor.name} overlap")
            if tensor.offset > end:
                raise ConvertError(f"{self.path}: unaccounted bytes before tensor {tensor.name}")
            end, previous = tensor.offset + tensor.n_bytes, tensor.name
        if end != size:
            raise ConvertError(
                f"{self.path}: {size} bytes long, but its tensors end at {end}; download it again"
            )

    def _tensor(self, name: str, entry: Any, data_offset: int, n_data: int) -> StoredTensor:
        where = f"{self.path}: tensor {name}"
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            begin, end = entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError) as error:
            raise ConvertError(f"{where}: needs dtype, shape and data_offsets") from error
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ConvertError(f"{where}: shape and offsets must be non-negative integers")
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise ConvertError(f"{where}: unknown data type {dtype!r}")
        if not begin <= end <= n_data:
            raise ConvertError(
                f"{where}: lies at [{begin}, {end}) of {n_data} bytes; the file is cut short "
                "or damaged"
            )
        n_bits = DTYPE_BITS[dtype]
        for n in shape:
            n_bits *= n
        if n_bits != 8 * (end - begin):
            raise ConvertError(
                f"{where}: {end - begin} bytes, but {dtype} {shape} takes {n_bits // 8}"
            )
        return StoredTensor(name, dtype, tuple(shape), self, data_offset + begin, end - begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key comes twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object names a key twice")
    return result
