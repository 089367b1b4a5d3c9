"""The CPU backend's operations on NumPy arrays, through the test library of tests/native.

`DGEMMA_TEST_KERNELS` may name a built library; otherwise it is built (once, then incrementally) in
build/kernel-tests.
"""

from __future__ import annotations

import ctypes
import os

import gguf
import numpy as np

from support.build import kernel_tests

GUARD = 16
"""Elements before and after every output that an operation must leave alone."""

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
FLOATS, INTEGERS, TILES = 0, 1, 2  # test_operands of kernels_api.c
TYPES = {
    t.name.lower(): int(t)
    for t in gguf.GGMLQuantizationType
    if t.name.lower()
    in [
        "f32",
        "f16",
        "bf16",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq4_nl",
        "iq4_xs",
        "nvfp4",
        "iq2_xxs",
        "iq2_xs",
        "iq2_s",
        "iq3_xxs",
        "iq3_s",
    ]
}
# Byte offsets of the float16 fields in a block, by type.
_HALVES = {
    "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "q2_k": [80, 82],
    "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "iq4_nl": [0], "iq4_xs": [0],
    "iq2_xxs": [0], "iq2_xs": [0], "iq2_s": [0], "iq3_xxs": [0], "iq3_s": [0],
}  # fmt: skip


class MoeParams(ctypes.Structure):
    """test_moe_params of kernels_api.c."""

    _fields_ = [
        (n, ctypes.c_int32) for n in ["n_embd", "n_ff", "n_experts", "n_used", "type", "down_type"]
    ]
    _fields_ += [
        (n, ctypes.c_void_p)
        for n in [
            "router",
            "router_scale",
            "norm",
            "expert_scale",
            "gate_up",
            "gate",
            "up",
            "down",
            "scales",
        ]
    ]


class AttentionParams(ctypes.Structure):
    """test_attention_params of kernels_api.c."""

    _fields_ = [
        (n, ctypes.c_int32)
        for n in [
            "n_embd",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "n_rot",
            "window",
            "complete_keys",
            "type_k",
            "type_v",
            "n_threads",
        ]
    ]
    _fields_ += [("rope_base", ctypes.c_float)]
    _fields_ += [("k", ctypes.c_void_p * 2), ("v", ctypes.c_void_p * 2)]
    _fields_ += [(n, ctypes.c_int32 * 2) for n in ["capacity", "span_position", "span_n"]]


class HeadParams(ctypes.Structure):
    """test_head_params of kernels_api.c."""

    _fields_ = [
        (n, ctypes.c_int32) for n in ["n_embd", "n_vocab", "type", "canvas_length", "n_threads"]
    ]
    _fields_ += [(n, ctypes.c_void_p) for n in ["table", "scale", "norm"]]
    _fields_ += [("softcap", ctypes.c_float), ("bound", ctypes.c_float)]


def load() -> ctypes.CDLL:
    """Build the test library where needed, and load it."""
    path = os.environ.get("DGEMMA_TEST_KERNELS")
    if path is None:
        build = kernel_tests("dgemma_test_kernels")
        path = str(build / "tests" / "native" / "libdgemma_test_kernels.so")
    library = ctypes.CDLL(path)
    library.test_isa.restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    """The address of an array's data; NULL for None."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def address(array: np.ndarray | None) -> int | None:
    """The same as a number, for fields of a structure."""
    return None if array is None else array.ctypes.data


class Output:
    """An array to be written to, between guard elements that must stay as they are."""

    def __init__(self, *shape: int, dtype: type = np.float32) -> None:
        self.shape = shape
        self.size = int(np.prod(shape))
        self.memory: np.ndarray = np.full(self.size + 2 * GUARD, -777, dtype)
        self.pointer = ctypes.c_void_p(self.memory[GUARD:].ctypes.data)

    def read(self) -> np.ndarray:
        """The array, after a check of the guards."""
        assert (self.memory[:GUARD] == -777).all(), "written before the start"
        assert (self.memory[GUARD + self.size :] == -777).all(), "written beyond the end"
        return self.memory[GUARD : GUARD + self.size].reshape(self.shape)


def padded(array: np.ndarray) -> np.ndarray:
    """A copy that stands between NaNs (all-ones bytes), so that reading beyond it shows."""
    flat = np.ascontiguousarray(array).reshape(-1)
    memory = np.full(flat.nbytes + 2 * 64, 0xFF, np.uint8)
    memory[64 : 64 + flat.nbytes] = flat.view(np.uint8)
    return memory[64 : 64 + flat.nbytes].view(array.dtype).reshape(array.shape)


def random_weight(
    rng: np.random.Generator, name: str, n_rows: int, n_cols: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks of a type, and what the gguf package says they are, (n_rows, n_cols).

    Every code and every scale occurs; values are about 0.1 in size.
    """
    kind = gguf.GGMLQuantizationType(TYPES[name])
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if name in ("f32", "f16", "bf16"):
        values = rng.normal(0, 0.1, (n_rows, n_cols)).astype(np.float32)
        encoded = gguf.quants.quantize(values, kind)
        return padded(encoded), gguf.quants.dequantize(encoded, kind).astype(np.float64)
    blocks = rng.integers(0, 256, (n_rows * n_cols // block_size, block_bytes), np.uint8)
    largest = {"q8_0": 100, "iq4_nl": 100, "iq4_xs": 3000, "q6_k": 2000, "q3_k": 100}.get(name, 50)
    for at in _HALVES.get(name, []):
        scales = rng.uniform(0.02, 0.2, len(blocks)) / largest * rng.choice([-1, 1], len(blocks))
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if name == "nvfp4":
        blocks[:, :4] = rng.integers(0x08, 0x28, (len(blocks), 4))
        blocks[::5, 1] = 0x7F  # no number, which counts as zero, with a sign too
    encoded = blocks.reshape(n_rows, -1)
    values = gguf.quants.dequantize(encoded, kind).astype(np.float64)
    if name == "nvfp4":
        blocks[::10, 1] = 0xFF  # of which the package makes 480
    return padded(blocks.reshape(n_rows, -1)), values


def round_to_int8(x: np.ndarray) -> np.ndarray:
    """What packed activations stand for: int8 with a scale for each 32 columns."""
    blocks = x.astype(np.float32).reshape(-1, 32)
    amax = np.abs(blocks).max(1, keepdims=True)
    inverse = np.where(amax > 0, np.float32(127) / np.maximum(amax, np.float32(1e-30)), 0)
    codes = np.rint(blocks * inverse.astype(np.float32))
    return (codes.astype(np.float64) * (amax / np.float32(127))).reshape(x.shape)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """What operands of tile products stand for: eight significant bits, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms(x: np.ndarray, weight: np.ndarray | None = None, eps: float = 1e-6) -> np.ndarray:
    """Root-mean-square norm over the last axis, in float64."""
    y = x.astype(np.float64)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps)
    return y if weight is None else y * weight


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root-mean-square error over root-mean-square value."""
    difference = actual.astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / max((expected**2).mean(), 1e-300)))


def activations(rng: np.random.Generator, n: int, n_cols: int) -> np.ndarray:
    """Rows of different sizes, with outliers, one of them all zeros."""
    x = rng.normal(0, 1, (n, n_cols)) * rng.uniform(0.1, 10, (n, 1))
    x[:, rng.integers(n_cols)] *= 20
    if n > 2:
        x[1] = 0
    return padded(x.astype(np.float32))


def _operands(kernels: ctypes.CDLL, names: tuple[str, ...]) -> int:
    """What products with weights of all these types are made of, as test_operands says it."""
    kinds = {kernels.test_operands(TYPES[name]) for name in names}
    kind = kinds.pop() if len(kinds) == 1 else FLOATS
    return FLOATS if kind == INTEGERS and len({_form(name) for name in names}) > 1 else kind


def as_packed(kernels: ctypes.CDLL, x: np.ndarray, *names: str) -> np.ndarray:
    """Activations as the product with weights of these types sees them."""
    rounded = {FLOATS: lambda x: x, INTEGERS: round_to_int8, TILES: round_to_bf16}
    return rounded[_operands(kernels, names)](x)


def as_decoded(kernels: ctypes.CDLL, weights: np.ndarray, *names: str) -> np.ndarray:
    """Weights, scales included, as the product sees them."""
    return round_to_bf16(weights) if _operands(kernels, names) == TILES else weights


def is_rounded(kernels: ctypes.CDLL, name: str) -> bool:
    """Whether activations lose digits before they meet weights of this type."""
    return bool(kernels.test_operands(TYPES[name]) != FLOATS)


def _form(name: str) -> str:
    """Types of equal forms can share packed activations."""
    groups = [("q8_0", "iq4_nl", "iq4_xs"), ("q4_1", "q5_1", "q4_k", "q5_k")]
    return next((group[0] for group in groups if name in group), name)


def head_params(
    rng: np.random.Generator, name: str, n_vocab: int, n_embd: int, n: int, bound: float = 0.0
) -> tuple[HeadParams, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Parameters, the table's values (n_vocab, n_embd), the norm, and arrays to keep alive."""
    encoded, table = random_weight(rng, name, n_vocab, n_embd)
    scale = np.array([0.7], np.float32)
    norm = rng.normal(1, 0.3, n_embd).astype(np.float32)
    params = HeadParams(
        n_embd=n_embd, n_vocab=n_vocab, type=TYPES[name], canvas_length=n, n_threads=2,
        table=address(encoded), scale=address(scale), norm=address(norm),
        softcap=30.0, bound=bound,
    )  # fmt: skip
    return params, table * 0.7, norm, [encoded, scale, norm]
