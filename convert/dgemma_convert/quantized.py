"""Checkpoints that are quantized already: NVFP4 of NVIDIA's and of RedHat's making, and FP8.

A quantized matrix X is stored as several tensors:

    ModelOpt NVFP4            X.weight (U8), X.weight_scale (F8_E4M3), X.weight_scale_2 (F32)
    compressed-tensors NVFP4  X.weight_packed (U8), X.weight_scale, X.weight_global_scale (F32)
    FP8                       X.weight (F8_E4M3), X.weight_scale or X.weight_scale_inv;
                              a stack of experts X (F8_E4M3), X_scale or X_scale_inv

NVFP4 is repacked bit for bit: GGUF has the same numbers in another order. FP8 is decoded. Such
checkpoints may also store each expert by itself; those are put together again here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .errors import ConvertError
from .lora import AdaptedSource
from .policy import Type
from .safetensors_file import StoredTensor
from .sources import Bytes, PlainSource, Source, Stack, matrices, read_floats

GROUP = 16  # elements that share an E4M3 scale
BLOCK = 64  # elements of a GGUF block

# Scales of activations and of caches: for engines that compute in 4 or 8 bits.
ACTIVATION_SCALES = (
    ".input_scale",
    ".input_global_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
)
# What others' quantized checkpoints have beside their weights, and whose they are.
FOREIGN = (
    (".qweight", "GPTQ or AWQ"),
    (".absmax", "bitsandbytes"),
    (".quant_state", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".biases", "MLX"),
    (".W_q", "HQQ"),
)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight\Z")


def _e4m3_values() -> NDArray[np.float32]:
    """The 256 values of F8_E4M3: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinity."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    values = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10)
    )
    values[bits & 127 == 127] = np.nan
    signed: NDArray[np.float32] = np.where(bits & 128, -values, values).astype(np.float32)
    return signed


E4M3 = _e4m3_values()


@dataclass(frozen=True)
class NVFP4Source:
    """A matrix of E2M1 nibbles: value = nibble · group scale · multiplier."""

    name: str
    packed: StoredTensor  # (n_rows, n_cols / 2): the low nibble is the element of even number
    scales: StoredTensor  # (n_rows, n_cols / 16)
    multipliers: NDArray[np.float32]  # (1)
    type: Type = Type.NVFP4

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_rows, n_cols)."""
        n_rows, n_bytes = self.packed.shape
        return n_rows, 2 * n_bytes

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) as GGUF's blocks: four scales, then the nibbles of four groups.

        Within a group byte j holds element j in its low and element j + 8 in its high nibble.
        """
        n_cols = self.shape[1]
        packed = self.packed.read(first * n_cols // 2, n * n_cols // 2)
        scales = self.scales.read(first * n_cols // GROUP, n * n_cols // GROUP)
        if np.any(scales >= 0x7F):  # a sign, or not a number
            raise ConvertError(
                f"tensor {self.scales.name}: a group scale is negative or not a number"
            )
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, BLOCK // GROUP, GROUP)
        blocks = np.empty((len(nibbles), BLOCK // GROUP + BLOCK // 2), np.uint8)
        blocks[:, : BLOCK // GROUP] = scales.reshape(-1, BLOCK // GROUP)
        halves = nibbles[:, :, : GROUP // 2] | nibbles[:, :, GROUP // 2 :] << 4
        blocks[:, BLOCK // GROUP :] = halves.reshape(len(nibbles), BLOCK // 2)
        return blocks.reshape(-1)


@dataclass(frozen=True)
class FP8Source:
    """F8_E4M3 weights and their scales, each of which is shared by a block of them."""

    stored: StoredTensor
    scales: NDArray[np.float32]  # (n_matrices, row blocks, column blocks)
    rows_per_scale: int
    cols_per_scale: int
    multipliers: None = None
    type: Type = Type.F32

    @property
    def name(self) -> str:
        """As in the checkpoint."""
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.stored.shape

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) of one matrix, decoded to float32."""
        _, n_rows, n_cols = matrices(self.shape)
        start = (matrix * n_rows + first) * n_cols
        values = E4M3[self.stored.read(start, n * n_cols)].reshape(n, n_cols)
        which = (first + np.arange(n)) // self.rows_per_scale
        values *= np.repeat(self.scales[matrix, which], self.cols_per_scale, axis=1)[:, :n_cols]
        return values.view(np.uint8).reshape(-1)


def kept_as(source: Source) -> Type:
    """The type in which a file keeps most of `source` at about its size: GGUF has no FP8."""
    if isinstance(source, Stack):
        return kept_as(source.parts[0])
    if isinstance(source, AdaptedSource):
        return kept_as(source.base)
    return Type.Q8_0 if isinstance(source, FP8Source) else source.type


@dataclass(frozen=True)
class Sources:
    """A checkpoint's tensors, and those that have no use in a GGUF file."""

    tensors: dict[str, Source]
    activation_scales: list[StoredTensor]


def read_sources(checkpoint: Checkpoint) -> Sources:
    """All tensors by the names that an unquantized checkpoint would give them.

    ConvertError where the parts of a quantized one do not fit together.
    """
    stored = dict(checkpoint.tensors)
    _refuse_foreign(checkpoint)
    unused = [stored.pop(name) for name in list(stored) if name.endswith(ACTIVATION_SCALES)]
    sources: dict[str, Source] = {}
    for name in list(stored):
        if name.endswith(".weight_packed"):
            base = name.removesuffix("_packed")
            sources[base] = _nvfp4(base, name, base + "_global_scale", stored, reciprocal=True)
        elif name.endswith(".weight") and name + "_scale_2" in stored:
            sources[name] = _nvfp4(name, name, name + "_scale_2", stored, reciprocal=False)
        elif name in stored and stored[name].dtype == "F8_E4M3" and _is_weight(name):
            sources[name] = _fp8(name, stored)
    # What is left are plain tensors; a scale without its weight is found when nothing asks for it.
    sources.update({name: PlainSource(tensor) for name, tensor in stored.items()})
    return Sources(_stack_experts(checkpoint, sources), unused)


def _refuse_foreign(checkpoint: Checkpoint) -> None:
    """ConvertError where the weights are in a form of others', which GGUF does not have."""
    for name in checkpoint.tensors:
        for ending, maker in FOREIGN:
            if name.endswith(ending) or (ending + ".") in name:
                raise ConvertError(
                    f"{checkpoint.folder}: is quantized by {maker} (tensor {name}), which GGUF "
                    "has no type for; convert the checkpoint that it was made from"
                )


def _take(stored: dict[str, StoredTensor], weight: str, name: str) -> StoredTensor:
    if name not in stored:
        raise ConvertError(f"tensor {weight} is quantized, but its scale {name} is missing")
    return stored.pop(name)


def _scales(tensor: StoredTensor) -> NDArray[np.float32]:
    values = read_floats(tensor)
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ConvertError(f"tensor {tensor.name}: scales must be positive, finite numbers")
    return values


def _nvfp4(
    name: str, packed_name: str, global_name: str, stored: dict[str, StoredTensor], reciprocal: bool
) -> Source:
    packed = stored.pop(packed_name)
    scales = _take(stored, name, name + "_scale")
    factor = _scales(_take(stored, name, global_name)).reshape(-1)
    if packed.dtype != "U8" or scales.dtype != "F8_E4M3" or len(packed.shape) != 2:
        raise ConvertError(
            f"tensor {packed_name}: expected a U8 matrix and F8_E4M3 scales, found {packed.dtype} "
            f"{list(packed.shape)} and {scales.dtype}"
        )
    n_rows, n_cols = packed.shape[0], 2 * packed.shape[1]
    if scales.shape != (n_rows, n_cols // GROUP) or len(factor) != 1:
        raise ConvertError(
            f"tensor {scales.name} has the shape {list(scales.shape)}; expected one scale for "
            f"{GROUP} of the {n_rows} x {n_cols} weights, and one factor for all"
        )
    if n_cols % BLOCK:
        raise ConvertError(
            f"tensor {packed_name}: rows of {n_cols} are not whole blocks of {BLOCK}"
        )
    return NVFP4Source(name, packed, scales, np.reciprocal(factor) if reciprocal else factor)


def _is_weight(name: str) -> bool:
    return not name.endswith(("_scale", "_scale_inv"))


def _fp8(name: str, stored: dict[str, StoredTensor]) -> Source:
    weight = stored.pop(name)
    scale_name = name + "_scale"
    if scale_name not in stored and name + "_scale_inv" in stored:
        # Called an inverse, but multiplied like the others.
        scale_name = name + "_scale_inv"
    scales = _scales(_take(stored, name, scale_name))
    if len(weight.shape) not in (2, 3):
        raise ConvertError(f"tensor {name}: F8_E4M3 {list(weight.shape)}; expected a matrix")
    n_matrices, n_rows, n_cols = matrices(weight.shape)
    found = list(scales.shape)
    # One number, or one a matrix or row, may be written with fewer dimensions than the weight.
    if scales.size in (1, n_matrices, n_matrices * n_rows) and scales.ndim < len(weight.shape):
        scales = scales.reshape(1 if scales.size == 1 else n_matrices, -1, 1)
    elif scales.ndim == len(weight.shape):
        scales = scales.reshape(matrices(scales.shape))
    if scales.shape == (1, 1, 1):
        scales = np.repeat(scales, n_matrices, axis=0)
    # The last block of a row or column may be cut off: 128 rather than the quotient, where it fits.
    for size in (128, 64, 32):
        if scales.shape == (n_matrices, -(-n_rows // size), -(-n_cols // size)):
            return FP8Source(weight, scales, size, size)
    if scales.ndim == 3 and scales.shape[0] == n_matrices:
        rows, rest_of_rows = divmod(n_rows, scales.shape[1])
        cols, rest_of_cols = divmod(n_cols, scales.shape[2])
        if rows and cols and not rest_of_rows and not rest_of_cols:
            return FP8Source(weight, scales, rows, cols)
    raise ConvertError(
        f"tensor {scale_name} has the shape {found}; expected one scale for all of "
        f"{list(weight.shape)}, one for each row, or one for each block of equal size"
    )


def _stack_experts(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Experts that are stored one by one, put together; everything else as it is."""
    result: dict[str, Source] = {}
    experts: dict[str, dict[int, Source]] = {}
    for name, source in sources.items():
        match = _EXPERT.match(name)
        if match:
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = source
        else:
            result[name] = source
    for name, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            missing = min(set(range(max(parts))) - set(parts))
            raise ConvertError(f"{checkpoint.folder}: expert {missing} of {name} is missing")
        ordered = tuple(parts[i] for i in range(len(parts)))
        if len({(part.shape, part.type) for part in ordered}) != 1:
            raise ConvertError(f"{checkpoint.folder}: experts of {name} differ in shape or type")
        result[name] = Stack(name, ordered)
    return result
