"""The encoders give the same bytes on every machine, with every compiler and instruction set."""

from __future__ import annotations

import ctypes
import hashlib

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dgemma import _native
from support import kernel_api

# SHA-256, shortened. They change when, and only when, a search does.
DIGESTS = {
    "f32": "46273d9a2c821036",
    "f16": "634fbd96650d25e7",
    "bf16": "776cedb893def69f",
    "q4_0": "e62984355998f592",
    "q4_1": "427394f4ef2b216e",
    "q5_0": "fa4d914c093b4483",
    "q5_1": "0eb10a6f5e7d7a83",
    "q8_0": "8df9e62d00044b37",
    "iq4_nl": "8bdaf013abe77101",
    "nvfp4": "8255633e5a87f29f",
    "q2_k": "f2c436bf4456265b",
    "q3_k": "ad158e6606b3c649",
    "q4_k": "04034dc8a8390f1b",
    "q5_k": "13fc11599cac3073",
    "q6_k": "3bfc526e0ee8d22a",
    "iq4_xs": "bc3aa05901f1b2ee",
    "iq2_xs": "7eb27b9f044f6ec6",
    "iq2_s": "f77cc04e6de9ba23",
    "iq3_xxs": "6fd559bf429ecff0",
    "iq3_s": "0af0197b3f36bc71",
}

ENCODE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
)


@pytest.mark.parametrize("name", DIGESTS)
def test_bytes_are_those_of_other_machines(name):
    # Sums of bits of a generator that is fixed for ever, since distributions may be revised.
    raw = np.random.PCG64(11).random_raw(20 * 1280).reshape(20, 1280)
    parts = np.stack([(raw >> np.uint64(8 * i)) & np.uint64(255) for i in range(8)])
    values = ((parts.astype(np.int64).sum(axis=0) - 1020) / 8192).astype(np.float32)
    values[:, ::61] *= 8
    importance = (np.arange(1280) % 7 + 1).astype(np.float32)
    digest = hashlib.sha256()
    for weights in (None, importance):
        data, multiplier = _native.quantize(
            values, "f32", name, 20, 1280, importance=weights, with_multiplier=True
        )
        digest.update(data.tobytes())
        digest.update(np.float32(multiplier).tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]


@pytest.fixture(scope="module")
def encoders() -> list[ctypes.Array[ctypes.c_void_p]]:
    """Tables of encoders, indexed by type: for any machine, and the others that run on this one."""
    library = kernel_api.load()
    library.test_encoders.restype = ctypes.POINTER(ctypes.c_void_p)
    tables = [table for table in map(library.test_encoders, range(3)) if table]
    if len(tables) == 1:
        pytest.skip("this machine has but one set of encoders")
    print(f"{len(tables)} sets of encoders")
    return tables


N_ELEMENTS = 256 * 37  # fills no batch of blocks


def awkward_values(kind: str) -> np.ndarray:
    rng = np.random.default_rng(12)
    normal = rng.normal(size=N_ELEMENTS)
    values = {
        "normal": normal * 0.02,
        "heavy": rng.standard_t(2, size=N_ELEMENTS) * 0.02,
        "mixed": normal * 2.0 ** rng.integers(-40, 10, N_ELEMENTS),
        "minute": normal * 1e-6,
        "equal": np.full(N_ELEMENTS, 0.3),
        "zero": np.zeros(N_ELEMENTS),
    }[kind]
    return values.clip(-60000, 60000).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy", "mixed", "minute", "equal", "zero"])
@pytest.mark.parametrize("name", DIGESTS)
def test_instruction_sets_agree(encoders, name, kind, weighted):
    values = awkward_values(kind)
    weights = np.random.default_rng(13).gamma(0.5, size=N_ELEMENTS).astype(np.float32) + 1e-4
    number = GGMLQuantizationType[name.upper()]
    block_size, block_bytes = GGML_QUANT_SIZES[number]
    results = []
    for table in encoders:
        out = np.zeros(N_ELEMENTS // block_size * block_bytes, np.uint8)
        encode = ENCODE(table[number])
        scale = 2500.0 if name == "nvfp4" else 1.0
        pointer = weights.ctypes.data if weighted else None
        encode(values.ctypes.data, out.ctypes.data, N_ELEMENTS, pointer, scale)
        results.append(out)
    assert all(np.array_equal(results[0], result) for result in results[1:])
