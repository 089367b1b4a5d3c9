"""Models with random weights in a GGUF of real size: to measure a machine before a long download.

The weights are well-conditioned, so that every step does what a real one does: router logits with a
standard deviation of 2 spread the tokens over the experts, and the residual stream neither dies nor
explodes. What comes out is noise, of course.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import LlamaFileType, Metadata
from numpy.typing import NDArray

from dgemma.quants import quantize
from dgemma.tensor_kinds import Kind

from . import encode
from .config import Layer, ModelConfig, Rope
from .errors import ConvertError, failing_in_words
from .metadata import Keys, ParameterCounts, model_keys
from .policy import Policy, Type, fitting, make_policy, row_bytes
from .production import Report, Target, produce
from .sources import ArraySource, Bytes, Source, matrices
from .synth_vocabulary import synthetic_vocabulary
from .tensors import MODEL_ROWS, MappedTensor, Row, layer_rows, rope_divisors, row_shape

# Encoding 23 billion random weights takes many minutes, so the experts' rows are drawn from a pool
# that is encoded once. The rest is drawn afresh: equal rows in the embedding are equal tokens.
POOL_ROWS = 8192


def _released_layers() -> tuple[Layer, ...]:
    sliding, full = Layer(True, 256, 8), Layer(False, 512, 2)
    return tuple(full if i % 6 == 5 else sliding for i in range(30))


PRESETS = {
    # The sizes of the released checkpoint.
    "26b-a4b": ModelConfig(
        hidden=2816,
        feed_forward=2112,
        vocab=262144,
        n_heads=16,
        layers=_released_layers(),
        experts=128,
        experts_used=8,
        expert_feed_forward=704,
        sliding_window=1024,
        context_length=262144,
        canvas_length=256,
        rms_eps=1e-6,
        softcap=30.0,
        full_head_dim=512,
        sliding_head_dim=256,
        full_rope=Rope(1e6, 64),
        sliding_rope=Rope(1e4, 128),
        bos_token_id=2,
        pad_token_id=0,
        eos_token_ids=(1,),
    ),
    # A model of a few megabytes, for trying out programs.
    "tiny-random": ModelConfig(
        hidden=256,
        feed_forward=192,
        vocab=1024,
        n_heads=4,
        layers=(Layer(True, 32, 2), Layer(True, 32, 2), Layer(False, 64, 1)),
        experts=8,
        experts_used=2,
        expert_feed_forward=64,
        sliding_window=64,
        context_length=4096,
        canvas_length=32,
        rms_eps=1e-6,
        softcap=30.0,
        full_head_dim=64,
        sliding_head_dim=32,
        full_rope=Rope(1e6, 8),
        sliding_rope=Rope(1e4, 16),
        bos_token_id=2,
        pad_token_id=0,
        eos_token_ids=(1,),
    ),
}


@dataclass(frozen=True)
class RandomSource:
    """Normal weights of standard deviation `std`, the same at every reading."""

    name: str
    shape: tuple[int, ...]
    std: float
    seed: int
    type: Type = Type.F32
    multipliers: None = None

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows of float32."""
        rng = _generator(self.seed, self.name, matrix, first)
        values = rng.standard_normal((n, self.shape[-1]), np.float32)
        values *= np.float32(self.std)
        return values.view(np.uint8).reshape(-1)


@dataclass(frozen=True)
class PooledSource:
    """Rows drawn at random from `pool` (n, row bytes), which holds encoded ones."""

    name: str
    shape: tuple[int, ...]
    type: Type
    pool: Bytes
    multiplier: float
    seed: int
    multipliers: NDArray[np.float32] | None = field(init=False)

    def __post_init__(self) -> None:
        n_matrices = matrices(self.shape)[0]
        values = np.full(n_matrices, self.multiplier, np.float32)
        object.__setattr__(self, "multipliers", values if self.multiplier != 1.0 else None)

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Encoded rows."""
        rng = _generator(self.seed, self.name, matrix, first)
        return self.pool[rng.integers(0, len(self.pool), n)].reshape(-1)


def synthesize(
    preset: str,
    outfile: Path,
    outtype: str,
    *,
    seed: int = 0,
    threads: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Report:
    """Writes a model of the sizes of `preset` (in PRESETS); raises ConvertError."""
    if preset not in PRESETS:
        raise ConvertError(f"unknown preset {preset!r}; expected one of {' '.join(PRESETS)}")
    config, policy = PRESETS[preset], make_policy(outtype)

    def keys(file_type: LlamaFileType, counts: ParameterCounts) -> Keys:
        general, vocabulary = {"name": f"synthetic {preset}"}, synthetic_vocabulary(config.vocab)
        return model_keys(Metadata(), config, file_type, counts, general, {}, vocabulary)

    with failing_in_words("writing"):
        return produce(
            _tensors(config, policy, seed, threads),
            policy,
            keys,
            Target(outfile, threads=threads, force=force, progress=progress),
            n_experts=config.experts,
        )


def preset_tensors(
    preset: str, outtype: str, tensor_types: Sequence[str] = ()
) -> list[encode.Step]:
    """What a file of `preset` would hold: shapes and types, for sums over sizes."""
    config, policy = PRESETS[preset], make_policy(outtype, tensor_types)
    tensors = [
        MappedTensor(name, row.kind, RandomSource(name, shape, 1.0, 0))
        for name, row, shape in _rows(config, policy)
    ]
    return encode.plan([*tensors, _frequencies(config)], policy)


def _rows(config: ModelConfig, policy: Policy) -> Iterator[tuple[str, Row, tuple[int, ...]]]:
    """The tensors of a file but for the frequencies: name, line of the table, shape."""
    for row in MODEL_ROWS:
        yield row.gguf, row, row_shape(config, row)
    # The multipliers of NVFP4 need gate and up apart (see encode.plan).
    split = policy.wanted("ffn_gate_up_exps.weight", Kind.EXPERTS_GATE_UP, Type.F32) is Type.NVFP4
    for i, layer in enumerate(config.layers):
        for row in layer_rows(layer, split):
            yield f"blk.{i}.{row.gguf}", row, row_shape(config, row, layer)
        row = Row("enc_layer_output_scale.weight", "", "one")
        yield f"blk.{i}.{row.gguf}", row, (1,)


def _frequencies(config: ModelConfig) -> MappedTensor:
    return MappedTensor("rope_freqs.weight", Kind.VECTOR, rope_divisors(config))


def _generator(seed: int, name: str, matrix: int, first: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), matrix, first])


def _tensors(config: ModelConfig, policy: Policy, seed: int, threads: int) -> list[MappedTensor]:
    pools: dict[tuple[Type, int], tuple[Bytes, float]] = {}

    def pooled(name: str, kind: Kind, shape: tuple[int, ...]) -> Source:
        n_cols = shape[-1]
        target = fitting(policy.wanted(name, kind, Type.F32), n_cols)
        if (target, n_cols) not in pools:
            values = RandomSource("pool", (POOL_ROWS, n_cols), n_cols**-0.5, seed)
            data, multiplier = quantize(
                values.read(0, 0, POOL_ROWS),
                int(Type.F32),
                int(target),
                POOL_ROWS,
                n_cols,
                with_multiplier=target is Type.NVFP4,
                threads=threads,
            )
            pools[target, n_cols] = data.reshape(-1, row_bytes(target, n_cols)), multiplier
        return PooledSource(name, shape, target, *pools[target, n_cols], seed)

    def add(name: str, row: Row, shape: tuple[int, ...]) -> None:
        source: Source
        if row.kind in (Kind.EXPERTS_GATE_UP, Kind.EXPERTS_DOWN):
            source = pooled(name, row.kind, shape)
        elif row.kind is Kind.VECTOR and len(shape) == 1:
            low, high = _range(row.gguf, shape)
            values = _generator(seed, name, 0, 0).uniform(low, high, shape)
            source = ArraySource(name, values.astype(np.float32))
        elif row.gguf == "ffn_gate_inp.weight":
            # Its input has a norm of 1, so this is the standard deviation of the router's logits.
            source = RandomSource(name, shape, 2.0, seed)
        else:
            source = RandomSource(name, shape, shape[-1] ** -0.5, seed)
        tensors.append(MappedTensor(name, row.kind, source))

    tensors: list[MappedTensor] = []
    for name, row, shape in _rows(config, policy):
        add(name, row, shape)
    tensors.insert(len(MODEL_ROWS), _frequencies(config))
    return tensors


def _range(gguf_name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Bounds of the uniform distribution of a norm's weights or of scales."""
    middle = 1.0
    if gguf_name in ("attn_q_norm.weight", "attn_k_norm.weight"):
        # Scores q·k are used unscaled: this gives them a standard deviation near 2.
        middle = math.sqrt(2.0) * shape[0] ** -0.25
    elif gguf_name in ("post_attention_norm.weight", "post_ffw_norm.weight"):
        middle = 0.3
    elif gguf_name.endswith("layer_output_scale.weight"):
        return 0.9, 1.0
    return 0.5 * middle, 1.5 * middle
