"""Encodes one tensor after the other into the new file, a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray

from dgemma import _native
from dgemma.errors import Error as EngineError

from .errors import ConvertError
from .importance import Importance
from .policy import WITH_MULTIPLIER, Policy, Type, fitting
from .quantized import kept_as
from .sources import Bytes, RowSlice, Source, matrices
from .tensors import MappedTensor
from .writer import TensorInfo, Writer

# Elements of a slice: large enough that starting the threads costs nothing, small enough that all
# buffers together stay far below a gigabyte.
SLICE_ELEMENTS = 16 << 20

FUSED = "ffn_gate_up_exps.weight"


@dataclass(frozen=True)
class Step:
    """One tensor of the file, or two: an NVFP4 tensor and its multipliers."""

    tensor: TensorInfo
    source: Source
    wanted: Type  # what the policy asked for; another than tensor.type where the width does not fit
    scale: TensorInfo | None = None  # (n_matrices) multipliers, float32
    scale_factor: Source | None = None  # multiplied into `scale`
    with_multiplier: bool = False  # choose a multiplier for each matrix while encoding
    importance: NDArray[np.float32] | None = None  # (n_matrices, n_cols) of the columns' errors

    @property
    def infos(self) -> list[TensorInfo]:
        """What the step writes."""
        return [self.tensor] if self.scale is None else [self.tensor, self.scale]


def plan(
    tensors: list[MappedTensor], policy: Policy, importance: Importance | None = None
) -> list[Step]:
    """What is to be written, in order."""
    steps = _steps(tensors, policy)
    if importance is None:
        return steps
    return [
        replace(step, importance=_importance(step, importance))
        if GGML_QUANT_SIZES[step.tensor.type][0] > 1
        else step
        for step in steps
    ]


def _importance(step: Step, importance: Importance) -> NDArray[np.float32] | None:
    n_matrices, _, n_cols = matrices(step.source.shape)
    return importance.of(step.tensor.name, n_matrices, n_cols)


def _steps(tensors: list[MappedTensor], policy: Policy) -> list[Step]:
    steps: list[Step] = []
    pending = {tensor.name: tensor for tensor in tensors}
    for tensor in tensors:
        if tensor.name not in pending:
            continue  # folded into an earlier step
        wanted = policy.wanted(tensor.name, tensor.kind, kept_as(tensor.source))
        fits = fitting(wanted, tensor.source.shape[-1])
        if fits is not Type.NVFP4 or tensor.kind not in WITH_MULTIPLIER:
            steps.append(Step(_info(tensor.name, tensor.source, fits), tensor.source, wanted))
            continue
        if tensor.name.endswith(FUSED):
            # llama.cpp has no multiplier for the fused tensor: its halves are written apart.
            half = tensor.source.shape[-2] // 2
            prefix = tensor.name.removesuffix(FUSED)
            parts: list[tuple[str, Source]] = [
                (f"{prefix}ffn_gate_exps.weight", RowSlice(tensor.source, 0, half)),
                (f"{prefix}ffn_up_exps.weight", RowSlice(tensor.source, half, half)),
            ]
        else:
            parts = [(tensor.name, tensor.source)]
        for name, source in parts:
            scale_name = name.removesuffix(".weight") + ".scale"
            # The down projections' place is taken by the router's scale of each expert. Both are
            # factors of an expert's output, so one number does for both.
            factor = pending.pop(scale_name, None)
            steps.append(
                Step(
                    tensor=_info(name, source, fits),
                    source=source,
                    wanted=wanted,
                    scale=TensorInfo(scale_name, (matrices(source.shape)[0],), Type.F32),
                    scale_factor=factor.source if factor else None,
                    with_multiplier=True,
                )
            )
    return steps


def check_types(steps: Sequence[Step]) -> None:
    """ConvertError where the engine cannot read or write a type that is needed."""
    for step in steps:
        source, target = step.source.type, step.tensor.type
        if source is target:
            continue
        if not _native.type_info(int(source)).decodes:
            raise ConvertError(
                f"tensor {step.source.name}: {source.name.lower()} cannot be decoded"
            )
        if not _native.type_info(int(target)).encodes:
            raise ConvertError(
                f"tensor {step.tensor.name}: {target.name.lower()} cannot be encoded"
            )


def run(
    steps: Sequence[Step], writer: Writer, threads: int, progress: Callable[[int], object]
) -> None:
    """Encodes and writes every step; `progress` is called with the bytes written."""
    for step in steps:
        n_matrices = matrices(step.source.shape)[0]
        scales = np.ones(n_matrices, np.float32)
        for matrix in range(n_matrices):
            for data, multiplier in _encode(step, matrix, threads):
                scales[matrix] = multiplier
                writer.write(step.tensor.name, data)
                progress(len(data))
        if step.scale is not None:
            if step.scale_factor is not None:
                scales *= _vector(step.scale_factor)
            writer.write(step.scale.name, scales.view(np.uint8))


def _info(name: str, source: Source, tensor_type: Type) -> TensorInfo:
    return TensorInfo(name, source.shape, tensor_type)


def _encode(step: Step, matrix: int, threads: int) -> Iterator[tuple[Bytes, float]]:
    """Slices of one matrix, each with the multiplier of the whole."""
    source, target = step.source, step.tensor.type
    _, n_rows, n_cols = matrices(source.shape)
    own = 1.0 if source.multipliers is None else float(source.multipliers[matrix])
    copied = source.type is target and (step.with_multiplier or own == 1.0)
    chooses = step.with_multiplier and not copied
    # One multiplier holds for the whole matrix, so that is what the encoder must see.
    at_once = n_rows if chooses else max(1, SLICE_ELEMENTS // n_cols)
    for first in range(0, n_rows, at_once):
        n = min(at_once, n_rows - first)
        data = source.read(matrix, first, n)
        if copied:
            yield data, own
            continue
        stored = source.type
        try:
            if own != 1.0:
                values = _native.dequantize(data, int(stored), n, n_cols, threads=threads)
                values *= np.float32(own)
                data, stored = values.view(np.uint8), Type.F32
            encoded = _native.quantize(
                data,
                int(stored),
                int(target),
                n,
                n_cols,
                importance=None if step.importance is None else step.importance[matrix],
                with_multiplier=chooses,
                threads=threads,
            )
        except (ValueError, EngineError) as error:
            raise ConvertError(f"tensor {source.name}: {error}") from error
        yield encoded


def _vector(source: Source) -> NDArray[np.float32]:
    """All values of a small tensor."""
    n = source.shape[-1]
    return _native.dequantize(source.read(0, 0, 1), int(source.type), 1, n).reshape(-1)
