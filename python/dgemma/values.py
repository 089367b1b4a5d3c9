"""Plain values that the engine takes and returns; shapes and units are those of dgemma.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
IdArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]
Progress: TypeAlias = Callable[[float], object]
"""Called with the share done in [0, 1]; returning False (not None) cancels the call."""


@dataclass(frozen=True)
class TypeInfo:
    """A tensor type of the file format: a row is a whole number of blocks."""

    id: int
    name: str
    block_size: int
    block_bytes: int
    encodes: bool
    decodes: bool

    def n_bytes(self, n_rows: int, n_cols: int) -> int:
        """Bytes of a tensor of this type; ValueError where a row is not whole blocks."""
        if n_rows < 0 or n_cols < 0 or n_cols % self.block_size:
            raise ValueError(
                f"{n_rows} x {n_cols} does not fit type {self.name}: "
                f"a row must be a multiple of {self.block_size} elements"
            )
        return n_rows * (n_cols // self.block_size) * self.block_bytes


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. `data` are its bytes in the mapped file, read-only and not copied."""

    name: str
    type: TypeInfo
    shape: tuple[int, ...]
    data: ByteArray

    @property
    def n_rows(self) -> int:
        """Product of all dimensions but the last."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def n_cols(self) -> int:
        """Last dimension."""
        return self.shape[-1]


@dataclass(frozen=True)
class Sampling:
    """The entropy-bound sampler, by the names of `transformers`' generation config.

    Entropies are in nats; temperatures go from `t_max` at the first step down to `t_min`.
    """

    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    stability_threshold: int = 1
    confidence_threshold: float = 0.005


@dataclass(frozen=True)
class CanvasNoise:
    """The draws of one canvas, made elsewhere.

    `initial` (canvas,): the first canvas. `candidates` (n_steps, canvas): the tokens drawn from
    softmax(logits / T). `renoise` (n_steps, canvas): the fresh tokens for what was not accepted.
    """

    initial: npt.ArrayLike
    candidates: npt.ArrayLike
    renoise: npt.ArrayLike


@dataclass(frozen=True)
class ReplayedDraws:
    """Draws made elsewhere for a whole answer, one entry a canvas: `generate` replays them."""

    canvases: Sequence[CanvasNoise]


@dataclass(frozen=True)
class CanvasStep:
    """What one denoising step left behind; arrays are copies of shape (canvas,)."""

    step: int
    n_accepted: int
    temperature: float
    mean_entropy: float
    done: bool
    settled: bool
    tokens: IdArray
    canvas: IdArray
    entropies: FloatArray


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of a loaded model, and what it runs on.

    `gpus` are the numbers of the GPUs that it is divided over, as `list_gpus` counts them, and
    `gpu_layers` says how many layers each has.
    """

    n_layers: int
    n_embd: int
    n_vocab: int
    n_heads: int
    n_ff: int
    n_experts: int
    n_experts_used: int
    n_ff_expert: int
    sliding_window: int
    n_sliding_layers: int
    canvas_length: int
    context_length: int
    n_parameters: int
    weight_bytes: int
    sampling: Sampling
    end_tokens: tuple[int, ...]
    backend: str
    backend_name: str
    backend_note: str
    n_gpu_layers: int
    n_cpu_moe: int
    file_note: str = ""
    gpus: tuple[int, ...] = ()
    gpu_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Bytes that a session takes: the mapped weights, its cache at full context, its scratch."""

    weights: int
    cache: int
    scratch: int

    @property
    def session(self) -> int:
        """What one more session over the same weights takes."""
        return self.cache + self.scratch


@dataclass(frozen=True)
class Activations:
    """The rows of activations that met one weight; n_matrices is 1, or the number of experts.

    `sums` (n_matrices, n_cols): their squares. `counts` (n_matrices,): how many rows.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class GpuShare:
    """What one GPU holds of a model, in bytes, and how many layers of it."""

    available: int
    n_layers: int
    weights: int
    cache: int
    scratch: int
    reserve: int
    total: int


@dataclass(frozen=True)
class GpuPlan:
    """Bytes that a model and one session take on a GPU, and which part of the model is there.

    Of several GPUs it is the sum, and `gpus` says what each holds.
    """

    n_gpu_layers: int
    n_cpu_moe: int
    weights: int
    cache: int
    scratch: int
    reserve: int
    total: int
    gpus: tuple[GpuShare, ...] = ()


@dataclass(frozen=True)
class BackendCheck:
    """A backend that can be used; bytes are those of its GPU, 0 for the CPU."""

    name: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class GpuInfo:
    """A GPU as CUDA shows it: `number` is what `device` takes, `capability` such as "8.9".

    `obstacle` says why it cannot be used; "" where it can.
    """

    number: int
    name: str
    uuid: str
    capability: str
    free_bytes: int
    total_bytes: int
    obstacle: str


@dataclass(frozen=True)
class Operation:
    """Time and work of one kind of operation, summed over `calls`."""

    name: str
    calls: int
    seconds: float
    flop: float
    bytes: float


@dataclass(frozen=True)
class Limits:
    """What this machine can do at most, as measured; 0 where it has no such unit."""

    read_gb_per_s: float
    int8_gop_per_s: float
    bf16_gflop_per_s: float
    f32_gflop_per_s: float
