"""Encoding and decoding for tests, by the engine and by the gguf package."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dgemma import _native

PLAIN = ["f32", "f16", "bf16"]
BLOCKS = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "nvfp4"]
SUPER_BLOCKS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]
CODEBOOKS = ["iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"]
READ_ONLY = ["iq2_xxs"]
SEARCHED = [t for t in BLOCKS + SUPER_BLOCKS if t != "q8_0"]
ENCODED = PLAIN + BLOCKS + SUPER_BLOCKS + CODEBOOKS
ALL = ENCODED + READ_ONLY
KINDS = ["normal", "heavy", "outliers", "tiny", "minute"]


def gguf_type(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name.upper()]


def sizes(name: str) -> tuple[int, int]:
    """Elements and bytes of a block."""
    block_size, block_bytes = GGML_QUANT_SIZES[gguf_type(name)]
    return block_size, block_bytes


def gguf_decoded(name: str, data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows = np.ascontiguousarray(data).view(np.uint8).reshape(shape[0], -1)
    if name == "nvfp4":
        # No number with a sign is none either: ours reads 0xff as 0x7f, the package as 480.
        blocks = rows.reshape(-1, 36).copy()
        scales = blocks[:, :4]
        scales[scales == 0xFF] = 0x7F
        rows = blocks.reshape(shape[0], -1)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, gguf_type(name)).astype(np.float32).reshape(shape)


def encoded(
    values: np.ndarray, name: str, *, source: str = "f32", **options: Any
) -> tuple[np.ndarray, float]:
    n_rows, n_cols = values.shape
    return _native.quantize(values, source, name, n_rows, n_cols, **options)


def round_trip(values: np.ndarray, name: str, **options: Any) -> np.ndarray:
    """Encoded here, decoded by the gguf package; NVFP4 with a multiplier, if not told otherwise."""
    options.setdefault("with_multiplier", True)
    data, multiplier = encoded(values, name, **options)
    return gguf_decoded(name, data, values.shape) * np.float32(multiplier)


def rms(values: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    return float(np.sqrt(np.mean(weights * values.astype(np.float64) ** 2)))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit, except that any NaN equals any other."""
    nan = np.isnan(a) & np.isnan(b)
    return bool(np.all(nan | (a.view(np.uint32) == b.view(np.uint32))))


def make_weights(kind: str, shape: tuple[int, int] = (24, 1024), seed: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape)
    scale = {"tiny": 1e-4, "minute": 1e-6}.get(kind, 0.02)
    if kind == "heavy":
        values = rng.standard_t(3, size=shape)
    if kind == "outliers":
        values[:, :: shape[1] // 11] *= 30
    return (values * scale).astype(np.float32)
