"""Importance matrices: how much each column of a weight matters, as llama.cpp's tools store it.

For each tensor there is the sum of the squared activations that met each column, and how many rows
of activations were counted. A column's mean square weighs the squared error of its weights.

Two kinds of files hold them. GGUF: `general.type` "imatrix", `imatrix.datasets`, `.chunk_count`
and `.chunk_size`, and for each tensor NAME.in_sum2 (n_matrices, n_cols) and NAME.counts
(n_matrices, 1), all float32. The older `.dat`, little endian, with nothing aligned:

    int32 n_entries
    n_entries times:
        int32 n, name (n bytes)
        int32 n_calls, int32 n, mean squares times n_calls (n float32)
    int32 n_chunks, int32 n, name of the dataset (n bytes); not in the oldest files

A `.dat` has no counts of single experts, and its entries do not say how many matrices they are for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from .errors import Error, FileAccessError, ModelFileError
from .files import NewFile, reason_of
from .gguf_file import File
from .quants import type_info
from .values import Activations

SUMS, COUNTS = ".in_sum2", ".counts"
# An expert that was met by few tokens is judged by them and by this many average ones: squares of
# activations vary by about their own size, so 64 of them give a mean to within an eighth.
AVERAGE_TOKENS = 64
# Tensors that see the same activations, where the file was made from a model with the other layout.
SAME_INPUT = (
    ("ffn_gate_exps.weight", "ffn_gate_up_exps.weight"),
    ("ffn_up_exps.weight", "ffn_gate_up_exps.weight"),
    ("ffn_gate_up_exps.weight", "ffn_gate_exps.weight"),
)

F32 = type_info("f32").id

Floats = NDArray[np.float32]


class Importance:
    """The importance matrix in a file of either kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.datasets: list[str] = []
        self.chunk_count = 0
        # Of a `.dat`, counts are None and the sums are means, flat.
        self._tensors: dict[str, tuple[Floats, Floats | None]] = {}
        try:
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
            if is_gguf:
                with File(path) as gguf:
                    self._read_gguf(gguf)
            else:
                self._read_dat(path.read_bytes())
        except FileAccessError:
            raise
        except OSError as error:
            raise FileAccessError(f"{path}: reading failed: {reason_of(error)}") from error
        except ModelFileError as error:
            named = str(path) in str(error)
            raise error if named else ModelFileError(f"{path}: {error}") from error
        if not self._tensors:
            raise ModelFileError(f"{path}: has no importance matrix (tensors named *{SUMS})")

    def __len__(self) -> int:
        return len(self._tensors)

    def of(self, name: str, n_matrices: int, n_cols: int) -> Floats | None:
        """(n_matrices, n_cols) mean squares for a tensor; None where the file says nothing of it.

        ModelFileError where it was made for a model of another size.
        """
        found = self._tensors.get(name)
        for suffix, other in SAME_INPUT:
            if found is None and name.endswith(suffix):
                found = self._tensors.get(name.removesuffix(suffix) + other)
        if found is None:
            return None
        sums, counts = found
        n_counts = n_matrices if counts is None else len(counts)
        if sums.size != n_matrices * n_cols or n_counts != n_matrices:
            raise ModelFileError(
                f"{self.path}: {name} has {sums.size} values for {n_counts} matrices; the model "
                f"needs {n_matrices} x {n_cols}: it was made for another model"
            )
        sums = sums.reshape(n_matrices, n_cols)
        return sums if counts is None else means(sums, counts)

    def _read_gguf(self, file: File) -> None:
        tensors = {tensor.name: tensor for tensor in file.tensors}
        keys = file.keys
        named = keys.get("imatrix.datasets", [])
        if isinstance(named, list):
            self.datasets = [str(dataset) for dataset in named]
        count = keys.get("imatrix.chunk_count", 0)
        self.chunk_count = count if isinstance(count, int) and 0 <= count < 2**32 else 0
        for name, tensor in tensors.items():
            if not name.endswith(SUMS):
                continue
            base = name.removesuffix(SUMS)
            counted = tensors.get(base + COUNTS)
            if counted is None or {tensor.type.id, counted.type.id} != {F32}:
                raise ModelFileError(f"{self.path}: {name} needs {base}{COUNTS}, both in f32")
            # Copied, because the file is closed before they are used.
            sums = np.frombuffer(tensor.data, np.float32).reshape(-1, tensor.n_cols).copy()
            counts = np.frombuffer(counted.data, np.float32).copy()
            self._check_values(base, sums, counts)
            if counts.sum() > 0:
                self._tensors[base] = sums, counts

    def _read_dat(self, data: bytes) -> None:
        reader = _Reader(data, self.path)
        n_entries = reader.int32()
        # An entry is at least a name of one byte, two numbers and a value.
        if not 1 <= n_entries <= len(data) // 17:
            raise ModelFileError(
                f"{self.path}: no importance matrix: it begins neither like a GGUF file nor like "
                f"one of llama.cpp's older .dat files"
            )
        for _ in range(n_entries):
            name = reader.text()
            n_calls = reader.int32()
            values = np.frombuffer(reader.take(4 * reader.int32()), "<f4").astype(np.float32)
            self._check_values(name, values)
            self._tensors[name] = values / np.float32(max(n_calls, 1)), None
        if not reader.at_end:
            self.chunk_count = max(reader.int32(), 0)
            self.datasets = [reader.text()]

    def _check_values(self, name: str, *arrays: Floats) -> None:
        for values in arrays:
            if not np.all(np.isfinite(values) & (values >= 0)):
                raise ModelFileError(f"{self.path}: {name} has negative or infinite values")


def means(sums: NDArray[np.floating], counts: NDArray[np.number]) -> Floats:
    """Mean squares (n_matrices, n_cols) from `sums` of that shape and `counts` (n_matrices).

    Experts that few tokens met lean on the average of all tokens and experts of the layer; one that
    no token met gets just that.
    """
    total = np.asarray(counts, np.float64)
    average = np.asarray(sums, np.float64).sum(0) / max(total.sum(), 1)
    blended = (sums + AVERAGE_TOKENS * average) / (total + AVERAGE_TOKENS)[:, None]
    found: Floats = blended.astype(np.float32)
    return found


class _Reader:
    """The bytes of a `.dat` in turn; ModelFileError where they end too early."""

    def __init__(self, data: bytes, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._data)

    def take(self, n: int) -> bytes:
        if not 0 <= n <= len(self._data) - self._at:
            raise ModelFileError(
                f"{self._path}: damaged: at byte {self._at} a length of {n} is given, but "
                f"{len(self._data) - self._at} bytes are left"
            )
        self._at += n
        return self._data[self._at - n : self._at]

    def int32(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def text(self) -> str:
        return self.take(self.int32()).decode("utf-8", "replace")


def save_importance(
    path: Path,
    collected: Mapping[str, Activations],
    *,
    dataset: str,
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Writes an importance matrix: a `.dat` where the name ends so, else a GGUF file.

    Tensors that nothing met are left out. The file appears under its name only when it is whole.
    FileAccessError where it cannot be written, Error where nothing was collected, or what is not
    finite.
    """
    met = {name: a for name, a in sorted(collected.items()) if a.counts.sum() > 0}
    if not met:
        raise Error(f"{path}: nothing was collected to write")
    for name, activations in met.items():
        if not np.isfinite(activations.sums).all():
            raise Error(f"{path}: what met {name} is not finite: the model is damaged")
    try:
        with NewFile(path, replace=True) as file:
            if path.suffix == ".dat":
                with os.fdopen(os.dup(file.fd), "wb") as stream:
                    stream.write(_dat(met, dataset, chunk_count))
            else:
                _write_gguf(file.hidden, met, [dataset], chunk_count, chunk_size)
            file.commit()
    except FileAccessError:
        raise
    except OSError as error:
        raise FileAccessError(f"{path}: writing failed: {reason_of(error)}") from error


def _write_gguf(
    path: Path,
    met: Mapping[str, Activations],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    writer = GGUFWriter(path, "")
    # llama.cpp's files have no general.architecture, which the package has put there already.
    writer.kv_data = [
        {
            "general.type": GGUFValue("imatrix", GGUFValueType.STRING),
            "imatrix.datasets": GGUFValue(
                list(datasets), GGUFValueType.ARRAY, GGUFValueType.STRING
            ),
            "imatrix.chunk_count": GGUFValue(chunk_count, GGUFValueType.UINT32),
            "imatrix.chunk_size": GGUFValue(chunk_size, GGUFValueType.UINT32),
        }
    ]
    for name, activations in met.items():
        writer.add_tensor(name + SUMS, activations.sums.astype(np.float32))
        writer.add_tensor(name + COUNTS, activations.counts[:, None].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _dat(met: Mapping[str, Activations], dataset: str, chunk_count: int) -> bytes:
    """A `.dat`. As it has no counts for single experts, the rarely met are blended here."""
    n_calls = max(chunk_count, 1)
    parts = [struct.pack("<i", len(met))]
    for name, activations in met.items():
        values = (means(activations.sums, activations.counts) * n_calls).astype("<f4").tobytes()
        encoded = name.encode()
        parts += [struct.pack("<i", len(encoded)), encoded]
        parts += [struct.pack("<ii", n_calls, len(values) // 4), values]
    encoded = dataset.encode()
    parts += [struct.pack("<ii", chunk_count, len(encoded)), encoded]
    return b"".join(parts)
