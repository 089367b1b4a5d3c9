"""Encodes one tensor after the other into the new file, a slice at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray

from dgemma.errors import Error
from dgemma.importance import Importance
from dgemma.quants import dequantize, quantize, type_info
from dgemma.tensor_kinds import Kind

from .errors import ConvertError
from .policy import WITH_MULTIPLIER, Policy, Type, fitting
from .quantized import kept_as
from .sources import Bytes, RowSlice, Source, matrices
from .tensors import MappedTensor
from .writer import TensorInfo, Writer

# Elements of a slice: large enough that starting the threads costs nothing, small enough that all
# buffers together stay far below a gigabyte.
SLICE_ELEMENTS = 16 << 20
QUEUE = 2  # slices that are read ahead, and that wait for the disk

# The bits that are all set in infinity and in what is no number.
EXPONENTS = {
    Type.F32: (np.uint32, 0x7F800000),
    Type.F16: (np.uint16, 0x7C00),
    Type.BF16: (np.uint16, 0x7F80),
}
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
    tensors: Sequence[MappedTensor], policy: Policy, importance: Importance | None = None
) -> list[Step]:
    """What is to be written, in order; ConvertError where an exception to the mix fits nothing."""
    names = [tensor.name for tensor in tensors if tensor.kind is not Kind.VECTOR]
    for pattern, _ in policy.by_name:
        if not any(pattern.search(name) for name in names):
            raise ConvertError(
                f"--tensor-type {pattern.pattern!r}: found in the name of no weight that can have "
                "another type; --dry-run lists all names"
            )
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


def _steps(tensors: Sequence[MappedTensor], policy: Policy) -> list[Step]:
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
        if not type_info(int(source)).decodes:
            raise ConvertError(
                f"tensor {step.source.name}: {source.name.lower()} cannot be decoded"
            )
        if not type_info(int(target)).encodes:
            raise ConvertError(
                f"tensor {step.tensor.name}: {target.name.lower()} cannot be encoded"
            )


def run(
    steps: Sequence[Step], writer: Writer, threads: int, progress: Callable[[int], object]
) -> None:
    """Encodes and writes every step; `progress` is called with the bytes written.

    Slices are read ahead and written behind by a thread each, so that the disk and the encoders
    work at the same time; their order, and so the file, is the same as without.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as disk:
        written: deque[Future[None]] = deque()
        try:
            for slice, data in _read_ahead(reader, _slices(steps)):
                step = slice.step
                encoded = slice.encode(data.result(), threads)
                written.append(disk.submit(writer.write, step.tensor.name, encoded))
                progress(len(encoded))
                if slice.is_last and step.scale is not None:
                    if step.scale_factor is not None:
                        slice.scales[:] *= _vector(step.scale_factor)
                    if not np.isfinite(slice.scales).all():
                        raise ConvertError(
                            f"tensor {step.scale.name}: has values that are infinite or no numbers"
                        )
                    scales = slice.scales.view(np.uint8)
                    written.append(disk.submit(writer.write, step.scale.name, scales))
                while len(written) > QUEUE:
                    written.popleft().result()
            for write in written:
                write.result()
        except BaseException:
            for pool in (reader, disk):
                pool.shutdown(wait=False, cancel_futures=True)
            raise


def _slices(steps: Sequence[Step]) -> Iterator[Slice]:
    for step in steps:
        n_matrices, n_rows, n_cols = matrices(step.source.shape)
        scales = np.ones(n_matrices, np.float32)
        # One multiplier holds for the whole matrix, so that is what the encoder must see.
        at_once = n_rows if step.with_multiplier else max(1, SLICE_ELEMENTS // n_cols)
        for matrix in range(n_matrices):
            for first in range(0, n_rows, at_once):
                n = min(at_once, n_rows - first)
                is_last = matrix + 1 == n_matrices and first + n == n_rows
                yield Slice(step, matrix, first, n, scales, is_last)


def _read_ahead(
    reader: ThreadPoolExecutor, slices: Iterator[Slice]
) -> Iterator[tuple[Slice, Future[Bytes]]]:
    """Each slice with its data, of which up to QUEUE are on the way."""
    waiting: deque[tuple[Slice, Future[Bytes]]] = deque()
    for slice in slices:
        waiting.append((slice, reader.submit(slice.read)))
        if len(waiting) > QUEUE:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


@dataclass(frozen=True)
class Slice:
    """Rows of one matrix of a step."""

    step: Step
    matrix: int
    first: int
    n: int
    scales: NDArray[np.float32]  # (n_matrices) multipliers of the step, which `encode` fills in
    is_last: bool  # of its step

    def read(self) -> Bytes:
        """The rows as the source has them."""
        return self.step.source.read(self.matrix, self.first, self.n)

    def encode(self, data: Bytes, threads: int) -> Bytes:
        """The rows as the file will have them; their multiplier goes into `scales`."""
        source, target = self.step.source, self.step.tensor.type
        n_cols = source.shape[-1]
        own = 1.0 if source.multipliers is None else float(source.multipliers[self.matrix])
        if source.type is target and (self.step.with_multiplier or own == 1.0):
            self._check_finite(data, n_cols, threads)
            self.scales[self.matrix] = own
            return data
        stored = source.type
        importance = self.step.importance
        try:
            if own != 1.0:
                values = dequantize(data, int(stored), self.n, n_cols, threads=threads)
                values *= np.float32(own)
                data, stored = values.view(np.uint8), Type.F32
            encoded, multiplier = quantize(
                data,
                int(stored),
                int(target),
                self.n,
                n_cols,
                importance=None if importance is None else importance[self.matrix],
                with_multiplier=self.step.with_multiplier,
                threads=threads,
            )
        except (ValueError, Error) as error:
            raise ConvertError(f"tensor {source.name}: {error}") from error
        self.scales[self.matrix] = multiplier
        return encoded

    def _check_finite(self, data: Bytes, n_cols: int, threads: int) -> None:
        """ConvertError where what is copied holds NaN or infinity; encoders look themselves."""
        source_type = self.step.source.type
        if source_type in EXPONENTS:
            kind, mask = EXPONENTS[source_type]
            finite = not np.any((data.view(kind) & mask) == mask)
        else:
            values = dequantize(data, int(source_type), self.n, n_cols, threads=threads)
            finite = bool(np.isfinite(values).all())
        if not finite:
            raise ConvertError(
                f"tensor {self.step.source.name}: has values that are infinite or no numbers; the "
                "checkpoint is damaged"
            )


def _info(name: str, source: Source, tensor_type: Type) -> TensorInfo:
    return TensorInfo(name, source.shape, tensor_type)


def _vector(source: Source) -> NDArray[np.float32]:
    """All values of a small tensor."""
    n = source.shape[-1]
    return dequantize(source.read(0, 0, 1), int(source.type), 1, n).reshape(-1)
