"""GGUF files of random weights in any type, made with NumPy alone and as fast as a disk takes them.

`dgemma synth` makes better ones and needs the package; this is for machines that have nothing but
Python and NumPy (bench/gpu.py). Blocks are drawn at random, not encoded: every bit pattern of a
block is a valid value, and only its scales decide how large the weights are.

    python bench/random_gguf.py --preset 26b-a4b --type q4_0 --outfile /tmp/random.gguf
"""

from __future__ import annotations

import argparse
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
POOL_BYTES = 32 << 20
"""Larger tensors repeat a pool of about so many bytes."""


def _halves(values: NDArray[Any] | float, n: int) -> Bytes:
    """n float16, as (n, 2) bytes."""
    return np.broadcast_to(np.asarray(values, np.float16), (n,)).view(np.uint8).reshape(n, 2)


@dataclass(frozen=True)
class Type:
    """A block type. `make(rng, n, std)` draws n blocks whose values have that spread."""

    number: int
    block: int
    n_bytes: int
    make: Callable[[np.random.Generator, int, float], Bytes]


def _float(kind: str) -> Callable[[np.random.Generator, int, float], Bytes]:
    def make(rng: np.random.Generator, n: int, std: float) -> Bytes:
        values = rng.standard_normal(n, np.float32) * np.float32(std)
        if kind == "f16":
            return values.astype(np.float16).view(np.uint8).reshape(n, 2)
        raw = values.view(np.uint8).reshape(n, 4)
        return raw if kind == "f32" else raw[:, 2:].copy()  # bfloat16 is the upper half

    return make


def _scaled(
    n_bytes: int, spread: float, middle: float, minimum: bool
) -> Callable[[np.random.Generator, int, float], Bytes]:
    """d, perhaps a minimum, then random bits: codes of standard deviation `spread` around
    `middle`, which the minimum takes out."""

    def make(rng: np.random.Generator, n: int, std: float) -> Bytes:
        blocks = rng.integers(0, 256, (n, n_bytes), np.uint8)
        d = std / spread * rng.uniform(0.7, 1.3, n)
        blocks[:, :2] = _halves(d, n)
        if minimum:
            blocks[:, 2:4] = _halves(-middle * d, n)
        return blocks

    return make


def _super(
    n_bytes: int, spread: float, d_at: int, ratio: float | None
) -> Callable[[np.random.Generator, int, float], Bytes]:
    """Random bits but for d at `d_at`, and behind it the factor of minima: `ratio` times d."""

    def make(rng: np.random.Generator, n: int, std: float) -> Bytes:
        blocks = rng.integers(0, 256, (n, n_bytes), np.uint8)
        d = std / spread * rng.uniform(0.7, 1.3, n)
        blocks[:, d_at : d_at + 2] = _halves(d, n)
        if ratio is not None:
            blocks[:, d_at + 2 : d_at + 4] = _halves(ratio * d, n)
        return blocks

    return make


def _nvfp4(rng: np.random.Generator, n: int, std: float) -> Bytes:
    blocks = rng.integers(0, 256, (n, 36), np.uint8)
    # E4M3 near std / 2.93, the root mean square of E2M1's values; its smallest step is 2^-9.
    exponent = math.floor(math.log2(max(std / 2.93, 2.0**-6)))
    step = 2.0 ** (max(exponent, -6) - 3)
    code = round(std / 2.93 / step) + (8 * (exponent + 6) if exponent > -6 else 0)
    blocks[:, :4] = min(max(code, 1), 0x7E)
    return blocks


# Spreads: of uniform codes, times the root mean square of their group scales in super-blocks.
TYPES = {
    "f32": Type(0, 1, 4, _float("f32")),
    "f16": Type(1, 1, 2, _float("f16")),
    "bf16": Type(30, 1, 2, _float("bf16")),
    "q4_0": Type(2, 32, 18, _scaled(18, 4.6, 0.0, False)),
    "q4_1": Type(3, 32, 20, _scaled(20, 4.6, 7.5, True)),
    "q5_0": Type(6, 32, 22, _scaled(22, 9.2, 0.0, False)),
    "q5_1": Type(7, 32, 24, _scaled(24, 9.2, 15.5, True)),
    "q8_0": Type(8, 32, 34, _scaled(34, 74.0, 0.0, False)),
    "q2_k": Type(10, 256, 84, _super(84, 14.0, 80, 1.5)),
    "q3_k": Type(11, 256, 110, _super(110, 43.0, 108, None)),
    "q4_k": Type(12, 256, 144, _super(144, 258.0, 0, 7.5)),
    "q5_k": Type(13, 256, 176, _super(176, 520.0, 0, 15.5)),
    "q6_k": Type(14, 256, 210, _super(210, 1370.0, 208, None)),
    "iq4_nl": Type(20, 32, 18, _scaled(18, 68.0, 0.0, False)),
    "iq4_xs": Type(23, 256, 136, _super(136, 1250.0, 0, None)),
    "nvfp4": Type(40, 64, 36, _nvfp4),
}


@dataclass(frozen=True)
class Preset:
    """Sizes of a model. Every `period`-th layer is a full one."""

    hidden: int
    feed_forward: int
    vocab: int
    heads: int
    layers: int
    period: int
    experts: int
    used: int
    expert_feed_forward: int
    window: int
    context: int
    canvas: int
    head_dim: tuple[int, int]  # sliding, full
    kv_heads: tuple[int, int]
    rotated: int  # dimensions of the full layers


PRESETS = {
    "26b-a4b": Preset(2816, 2112, 262144, 16, 30, 6, 128, 8, 704, 1024, 262144, 256,
                      (256, 512), (8, 2), 128),
    # For correctness: odd counts, and every width a multiple of 256, so that all types apply.
    "small": Preset(256, 512, 1003, 4, 3, 3, 5, 3, 256, 19, 4096, 24, (32, 64), (2, 1), 32),
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor: name, shape (rows first), type, and how its values spread."""

    name: str
    shape: tuple[int, ...]
    type: str
    std: float
    bounds: tuple[float, float] | None = None  # of a vector of uniform values

    def n_bytes(self) -> int:
        """Bytes in the file."""
        kind = TYPES[self.type]
        return math.prod(self.shape) // kind.block * kind.n_bytes

    def chunks(self, seed: int) -> Iterator[Bytes]:
        """The data, piece by piece."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        if self.name == "rope_freqs.weight":
            return iter(())  # written by the caller
        if self.bounds is not None:
            values = rng.uniform(*self.bounds, self.shape).astype(np.float32)
            return iter((values.view(np.uint8).reshape(-1),))
        return self._blocks(rng)

    def _blocks(self, rng: np.random.Generator) -> Iterator[Bytes]:
        kind = TYPES[self.type]
        left = math.prod(self.shape) // kind.block
        pool = kind.make(rng, min(left, POOL_BYTES // kind.n_bytes), self.std)
        while left > 0:
            # Starting elsewhere each time: rows must not be equal where the pool ends with a row.
            first = int(rng.integers(0, len(pool))) if left > len(pool) else 0
            piece = pool[first : first + left]
            yield piece.reshape(-1)
            left -= len(piece)


def all_tensors(p: Preset, kind: str, embedding: str | None = None) -> list[Tensor]:
    """All tensors of a model whose matrices are of type `kind`; where rows are too short for its
    blocks, of q5_0. The embedding is q6_k in 4- and 5-bit files, unless named."""
    if embedding is None:
        embedding = "q8_0" if kind == "nvfp4" else "q6_k" if kind.startswith(("q4", "q5")) else kind

    def matrix(name: str, *shape: int, want: str = kind) -> Tensor:
        fits = shape[-1] % TYPES[want].block == 0
        return Tensor(f"{name}.weight", shape, want if fits else "q5_0", shape[-1] ** -0.5)

    def vector(name: str, n: int, middle: float = 1.0) -> Tensor:
        return Tensor(name, (n,), "f32", 0, (0.5 * middle, 1.5 * middle))

    h, ff, width = p.hidden, p.feed_forward, p.expert_feed_forward
    dense = "q8_0" if kind == "nvfp4" else kind
    found = [
        matrix("token_embd", p.vocab, h, want=embedding),
        vector("output_norm.weight", h),
        vector("self_cond_pre_norm.weight", h),
        matrix("self_cond_gate", ff, h, want=dense),
        matrix("self_cond_up", ff, h, want=dense),
        matrix("self_cond_down", h, ff, want=dense),
        Tensor("rope_freqs.weight", (p.head_dim[1] // 2,), "f32", 0),
    ]
    for i in range(p.layers):
        full = int(i % p.period == p.period - 1)
        dim, kv = p.head_dim[full], p.kv_heads[full]
        layer = [
            vector("attn_norm.weight", h),
            matrix("attn_q", p.heads * dim, h, want=dense),
            matrix("attn_k", kv * dim, h, want=dense),
            # Scores q·k are used unscaled: this gives them a standard deviation near 2.
            vector("attn_q_norm.weight", dim, math.sqrt(2) * dim**-0.25),
            vector("attn_k_norm.weight", dim, math.sqrt(2) * dim**-0.25),
            matrix("attn_output", h, p.heads * dim, want=dense),
            vector("post_attention_norm.weight", h, 0.3),
            vector("ffn_norm.weight", h),
            matrix("ffn_gate", ff, h, want=dense),
            matrix("ffn_up", ff, h, want=dense),
            matrix("ffn_down", h, ff, want=dense),
            vector("pre_ffw_norm_2.weight", h),
            # Its input has a norm of 1, so this is the standard deviation of the router's logits.
            Tensor("ffn_gate_inp.weight", (p.experts, h), "f32", 2.0),
            vector("ffn_gate_inp.scale", h),
            matrix("ffn_gate_up_exps", p.experts, 2 * width, h),
            matrix("ffn_down_exps", p.experts, h, width),
            vector("ffn_down_exps.scale", p.experts),
            vector("post_ffw_norm.weight", h, 0.3),
            vector("post_ffw_norm_1.weight", h),
            vector("post_ffw_norm_2.weight", h),
            vector("layer_output_scale.weight", 1, 0.9),
            vector("enc_layer_output_scale.weight", 1, 0.9),
        ]
        if not full:
            layer.insert(3, matrix("attn_v", kv * dim, h, want=dense))
        found += [Tensor(f"blk.{i}.{t.name}", t.shape, t.type, t.std, t.bounds) for t in layer]
    return found


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _key(name: str, value: str | int | float | bool | list[int] | list[bool]) -> bytes:
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        code, form = (7, "?") if isinstance(value[0], bool) else (4, "I")
        head = struct.pack("<IIQ", 9, code, len(value))
        return _text(name) + head + struct.pack(f"<{len(value)}{form}", *value)
    if isinstance(value, float):
        return _text(name) + struct.pack("<If", 6, value)
    return _text(name) + struct.pack("<II", 4, value)


def keys(p: Preset) -> list[bytes]:
    """What the engine wants to know of a model; there is no tokenizer."""
    full = [i % p.period == p.period - 1 for i in range(p.layers)]
    found: dict[str, Any] = {
        "block_count": p.layers,
        "context_length": p.context,
        "embedding_length": p.hidden,
        "feed_forward_length": p.feed_forward,
        "attention.head_count": p.heads,
        "attention.head_count_kv": [p.kv_heads[f] for f in full],
        "attention.key_length": p.head_dim[1],
        "attention.value_length": p.head_dim[1],
        "attention.key_length_swa": p.head_dim[0],
        "attention.value_length_swa": p.head_dim[0],
        "attention.sliding_window": p.window,
        "attention.sliding_window_pattern": [not f for f in full],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": p.head_dim[1],
        "rope.dimension_count_swa": p.head_dim[0],
        "expert_count": p.experts,
        "expert_used_count": p.used,
        "expert_feed_forward_length": p.expert_feed_forward,
        "final_logit_softcapping": 30.0,
    }
    made = [_key("general.architecture", "diffusion-gemma"), _key("general.name", "random")]
    made += [_key(f"diffusion-gemma.{name}", value) for name, value in found.items()]
    return [*made, _key("diffusion.canvas_length", p.canvas)]


def write(
    preset: str, kind: str, outfile: Path, embedding: str | None = None, seed: int = 0
) -> int:
    """Writes a file; its bytes."""
    p = PRESETS[preset]
    written, all_keys = all_tensors(p, kind, embedding), keys(p)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(written), len(all_keys)) + b"".join(all_keys)
    offset = 0
    for t in written:
        dims = t.shape[::-1]
        head += _text(t.name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        head += struct.pack("<IQ", TYPES[t.type].number, offset)
        offset += -(-t.n_bytes() // 32) * 32
    with outfile.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for t in written:
            if t.name == "rope_freqs.weight":
                divisors = np.full(t.shape, 1e30, np.float32)
                divisors[: p.rotated // 2] = 1
                file.write(divisors.tobytes())
            for chunk in t.chunks(seed):
                file.write(chunk)  # type: ignore[arg-type]  # a C-contiguous array is a buffer
            file.write(bytes(-t.n_bytes() % 32))
        return file.tell()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--type", choices=TYPES, default="q4_0", help="of the matrices")
    parser.add_argument("--embedding", choices=TYPES, help="type of the embedding")
    parser.add_argument("--outfile", type=Path, required=True)
    args = parser.parse_args()
    print(write(args.preset, args.type, args.outfile, args.embedding), "bytes")


if __name__ == "__main__":
    main()
