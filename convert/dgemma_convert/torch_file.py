"""Reads tensors out of a PyTorch file (.bin, .pt) without running anything that stands in it.

Such a file is a ZIP archive of raw storages and a pickle, a program that builds the objects. Only
the handful of calls that make up tensors are let through, and none of them is PyTorch's own.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ConvertError
from .safetensors_file import DTYPE_BITS, MAX_HEADER_BYTES, SafetensorsFile, StoredTensor

_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_LOCAL_HEADER = 30  # bytes of a ZIP entry's header before its name


@dataclass(frozen=True)
class _View:
    """What the pickle says of a tensor."""

    dtype: str
    key: str  # of the storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """A pickle machine whose only functions are those below."""

    def find_class(self, module: str, name: str) -> Any:
        """One of ours in place of PyTorch's; UnpicklingError for everything else."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which would run code; save it as safetensors"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """A storage: (dtype, key)."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or dtype not in DTYPE_BITS or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unknown storage {pid!r:.80}")
        return dtype, key


def _tensor(storage: tuple[str, str], offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    numbers = [offset, *shape, *strides]
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor's shape is no list of sizes")
    return _View(*storage, offset, tuple(shape), tuple(strides))


class TorchFile(SafetensorsFile):
    """One open PyTorch file; a name for each tensor of its dictionary."""

    def _read_header(self) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                program = next((n for n in entries if n.rsplit("/", 1)[-1] == "data.pkl"), None)
                if program is None or entries[program].file_size > MAX_HEADER_BYTES:
                    raise ConvertError(f"{self.path}: no PyTorch file: it has no data.pkl")
                found = _Unpickler(io.BytesIO(archive.read(program))).load()
        except zipfile.BadZipFile as error:
            raise ConvertError(
                f"{self.path}: no PyTorch file of version 1.6 or later; save it as safetensors"
            ) from error
        except ConvertError:
            raise
        except Exception as error:  # a damaged pickle ends in errors of any kind
            reason = " ".join(str(error).split())[:200]
            raise ConvertError(f"{self.path}: cannot be read: {reason}") from error
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        if not isinstance(found, dict):
            raise ConvertError(f"{self.path}: holds no dictionary of tensors")
        folder = program.removesuffix("data.pkl")
        for name, view in found.items():
            if not isinstance(name, str) or not isinstance(view, _View):
                raise ConvertError(f"{self.path}: {str(name)[:80]!r} is no tensor")
            self.tensors[name] = self._stored(name, view, entries.get(f"{folder}data/{view.key}"))

    def _stored(self, name: str, view: _View, entry: zipfile.ZipInfo | None) -> StoredTensor:
        size = DTYPE_BITS[view.dtype] // 8
        n_bytes, first = size * math.prod(view.shape), size * view.offset
        flat = all(
            n == 1 or view.strides[i] == math.prod(view.shape[i + 1 :])
            for i, n in enumerate(view.shape)
        )
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise ConvertError(f"{self.path}: tensor {name}: its storage is missing")
        if not flat or first + n_bytes > entry.file_size:
            raise ConvertError(
                f"{self.path}: tensor {name}: is not stored in one piece; save it as safetensors"
            )
        header = self.read(entry.header_offset, _LOCAL_HEADER).tobytes()
        n_name, n_extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        offset = entry.header_offset + _LOCAL_HEADER + n_name + n_extra + first
        return StoredTensor(name, view.dtype, view.shape, self, offset, n_bytes)
