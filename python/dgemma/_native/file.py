"""GGUF files: metadata as Python values, tensors as views of the mapped file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from .._dgemma import ffi, lib
from ..errors import Error
from ..values import Tensor, TypeInfo
from .calls import PathLike, c_path, check
from .types import type_info

_SCALARS = {
    lib.DG_VALUE_UINT8: "<u1",
    lib.DG_VALUE_INT8: "<i1",
    lib.DG_VALUE_UINT16: "<u2",
    lib.DG_VALUE_INT16: "<i2",
    lib.DG_VALUE_UINT32: "<u4",
    lib.DG_VALUE_INT32: "<i4",
    lib.DG_VALUE_FLOAT32: "<f4",
    lib.DG_VALUE_BOOL: "?",
    lib.DG_VALUE_UINT64: "<u8",
    lib.DG_VALUE_INT64: "<i8",
    lib.DG_VALUE_FLOAT64: "<f8",
}
_LENGTH = Struct("<Q")


def _strings(data: bytes, n: int) -> list[str]:
    found, at = [], 0
    for _ in range(n):
        (size,) = _LENGTH.unpack_from(data, at)
        at += 8 + size
        found.append(data[at - size : at].decode())
    return found


def _decode(value: Any) -> Any:
    data = bytes(ffi.buffer(value.data, value.n_bytes)) if value.n_bytes else b""
    if value.element_type == lib.DG_VALUE_STRING:
        return _strings(data, value.n) if value.type == lib.DG_VALUE_ARRAY else data.decode()
    numbers = np.frombuffer(data, _SCALARS[value.element_type], count=value.n).tolist()
    return numbers if value.type == lib.DG_VALUE_ARRAY else numbers[0]


class Keys(Mapping[str, Any]):
    """The metadata of a file as Python values; arrays are lists. Decoded when first asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._decoded: dict[str, Any] = {}
        self._names: list[str] = []
        name, value = ffi.new("const char **"), ffi.new("dg_value *")
        for index in range(lib.dg_file_n_keys(file)):
            lib.dg_file_key(file, index, name, value)
            self._names.append(ffi.string(name[0]).decode())

    def __getitem__(self, name: str) -> Any:
        if name not in self._decoded:
            value = ffi.new("dg_value *")
            if not lib.dg_file_find_key(self._file, name.encode(), value):
                raise KeyError(name)
            self._decoded[name] = _decode(value)
        return self._decoded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def type_of(self, name: str) -> tuple[int, int]:
        """GGUF's numbers for a value's type and for its elements' type; equal if it is no array."""
        value = ffi.new("dg_value *")
        if not lib.dg_file_find_key(self._file, name.encode(), value):
            raise KeyError(name)
        return int(value.type), int(value.element_type)


class File:
    """A checked, read-only, memory-mapped GGUF file, or all the shards of one.

    Errors: FileAccessError where it cannot be read, ModelFileError where it is damaged. Tensor
    data stays valid after `close`, for as long as somebody holds it.
    """

    def __init__(self, path: PathLike) -> None:
        out, error = ffi.new("dg_file **"), ffi.new("dg_error *")
        check(lib.dg_file_open(c_path(path), out, error), error)
        self._file: Any = ffi.gc(out[0], lib.dg_file_close)

    @classmethod
    def of(cls, model: Any) -> File:
        """The file that a loaded model (a `dg_model *`) was opened from."""
        self = cls.__new__(cls)
        # The view must keep the model, and with it the mapping, alive.
        self._file = ffi.gc(lib.dg_model_file(model), lambda _, keep=model: None)
        return self

    def _open(self) -> Any:
        file = self._file
        if file is None:
            raise Error("this file is closed: open it again")
        return file

    @property
    def n_bytes(self) -> int:
        """Size of all shards together."""
        return int(lib.dg_file_n_bytes(self._open()))

    @property
    def keys(self) -> Keys:
        """The metadata."""
        return Keys(self._open())

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the file's order."""
        file = self._open()
        info = ffi.new("dg_tensor_info *")
        found, types = [], {}
        for index in range(lib.dg_file_n_tensors(file)):
            lib.dg_file_tensor(file, index, info)
            if info.type not in types:
                types[info.type] = type_info(info.type)
            found.append(_tensor(info, types[info.type], file))
        return found

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; KeyError where there is none."""
        file, info = self._open(), ffi.new("dg_tensor_info *")
        if not lib.dg_file_find_tensor(file, name.encode(), info):
            raise KeyError(name)
        return _tensor(info, type_info(info.type), file)

    def read(self, name: str, first: int, n: int) -> npt.NDArray[np.uint8]:
        """Bytes [first, first + n) of a tensor's data, read and not mapped.

        A file that is cut short meanwhile raises ModelFileError, where touching mapped data would
        end the process; and no page stays in this process's memory.
        """
        data, error = np.empty(n, np.uint8), ffi.new("dg_error *")
        pointer = ffi.from_buffer(data)
        check(lib.dg_file_read(self._open(), name.encode(), first, n, pointer, error), error)
        return data

    def check_unchanged(self) -> None:
        """ModelFileError where the file was written to since it was opened."""
        error = ffi.new("dg_error *")
        check(lib.dg_file_check(self._open(), error), error)

    def close(self) -> None:
        """Lets go of the file; twice is no error."""
        self._file = None

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tensor(info: Any, type: TypeInfo, file: Any) -> Tensor:
    pointer = ffi.gc(ffi.cast("const char *", info.data), lambda _, keep=file: None)
    data = np.frombuffer(ffi.buffer(pointer, info.n_bytes), np.uint8)
    data.flags.writeable = False
    shape = tuple(info.shape[i] for i in range(info.n_dims))
    return Tensor(ffi.string(info.name).decode(), type, shape, data)
