"""Importance matrices: how much each column of a weight matters, as llama.cpp's tools store it.

For each tensor the file has the sum of the squared activations that met each column, and how many
rows of activations were counted. A column's mean square weighs the squared error of its weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgemma import _native
from dgemma.errors import Error as EngineError

from .errors import ConvertError
from .policy import Type

SUMS, COUNTS = ".in_sum2", ".counts"
# An expert that was met by few tokens is judged by them and by this many average ones.
AVERAGE_TOKENS = 64
# Tensors that see the same activations, where the file was made from a model with the other layout.
SAME_INPUT = (
    ("ffn_gate_exps.weight", "ffn_gate_up_exps.weight"),
    ("ffn_up_exps.weight", "ffn_gate_up_exps.weight"),
    ("ffn_gate_up_exps.weight", "ffn_gate_exps.weight"),
)

Floats = NDArray[np.float32]


class Importance:
    """The importance matrix in a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, tuple[Floats, Floats]] = {}
        try:
            with _native.File(path) as file:
                self._read(file)
        except (EngineError, OSError) as error:
            raise ConvertError(f"{path}: {error}") from error
        if not self._tensors:
            raise ConvertError(f"{path}: has no importance matrix (tensors named *{SUMS})")

    def __len__(self) -> int:
        return len(self._tensors)

    def of(self, name: str, n_matrices: int, n_cols: int) -> Floats | None:
        """(n_matrices, n_cols) mean squares for a tensor; None where the file says nothing of it.

        ConvertError where it was made for a model of another size.
        """
        found = self._tensors.get(name)
        for suffix, other in SAME_INPUT:
            if found is None and name.endswith(suffix):
                found = self._tensors.get(name.removesuffix(suffix) + other)
        if found is None:
            return None
        sums, counts = found
        if sums.shape != (n_matrices, n_cols) or counts.shape != (n_matrices,):
            raise ConvertError(
                f"{self.path}: {name} has {sums.shape[0]} x {sums.shape[1]} values; the model "
                f"needs {n_matrices} x {n_cols}: it was made for another model"
            )
        total = counts.sum()
        if total == 0:
            return None
        average = sums.sum(0) / total
        means: Floats = (sums + AVERAGE_TOKENS * average) / (counts + AVERAGE_TOKENS)[:, None]
        return means

    def _read(self, file: _native.File) -> None:
        tensors = {tensor.name: tensor for tensor in file.tensors}
        for name, tensor in tensors.items():
            if not name.endswith(SUMS):
                continue
            base = name.removesuffix(SUMS)
            counted = tensors.get(base + COUNTS)
            if counted is None or {tensor.type.id, counted.type.id} != {int(Type.F32)}:
                raise ConvertError(f"{self.path}: {name} needs {base}{COUNTS}, both in f32")
            # Copied, because the file is closed before they are used.
            sums = np.frombuffer(tensor.data, np.float32).reshape(-1, tensor.n_cols).copy()
            counts = np.frombuffer(counted.data, np.float32).copy()
            for values in (sums, counts):
                if not np.all(np.isfinite(values) & (values >= 0)):
                    raise ConvertError(f"{self.path}: {base} has negative or infinite values")
            self._tensors[base] = sums, counts
