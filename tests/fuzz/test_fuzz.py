"""A short run of every fuzz target, and random damage to the files that Python parses.

tests/fuzz/run.sh runs the targets for longer, under libFuzzer where clang is installed.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dgemma.errors import Error
from dgemma.importance import Importance, save_importance
from dgemma.values import Activations
from dgemma_convert.safetensors_file import SafetensorsFile
from support import small_model
from support.build import ROOT, kernel_tests

RUNS = {
    "gguf": 1500, "header": 3000, "session": 1500, "model": 400,
    "rows": 3000, "canvas": 3000, "options": 3000,
}  # fmt: skip
CORPUS = {"header": "gguf"}
# Of fuzz_python.py.
PYTHON_RUNS = {
    "safetensors": 800, "index": 400, "config": 400, "vocabulary": 150, "importance": 800,
    "keys": 800, "calls": 800, "body": 800, "messages": 800, "request": 400,
    "options": 800, "tools": 800, "schema": 800, "batch": 800,
}  # fmt: skip
DAMAGED = 500


@pytest.fixture(scope="module")
def targets() -> Path:
    """The folder of the targets, built with sanitizers and tests/fuzz/driver.c."""
    build = kernel_tests(*(f"fuzz_{name}" for name in RUNS))
    return build / "tests" / "fuzz"


@pytest.mark.parametrize("name", RUNS)
def test_target(targets: Path, name: str, tmp_path: Path) -> None:
    model = small_model.write(tmp_path / "model.gguf")
    corpus = ROOT / "tests" / "fuzz" / "corpus" / CORPUS.get(name, name)
    done = subprocess.run(
        [targets / f"fuzz_{name}", f"-runs={RUNS[name]}", "-seed=1", corpus],
        env={**os.environ, "DGEMMA_FUZZ_MODEL": str(model)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert f"{RUNS[name]} changed inputs" in done.stdout


@pytest.mark.parametrize("name", PYTHON_RUNS)
def test_python_target(name: str) -> None:
    """Of seeds, and of changes to them and to what was accepted of these."""
    runs = PYTHON_RUNS[name]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/fuzz/fuzz_python.py", name, "-driver", f"-runs={runs}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert f"{runs} changed inputs" in done.stdout


# ---- Parsers in Python ---------------------------------------------------------------------------


def damaged(seed: bytes, rng: np.random.Generator) -> bytes:
    """A copy with up to four places changed, doubled, taken out or replaced by extreme numbers."""
    data = bytearray(seed)
    for _ in range(rng.integers(1, 5)):
        at, n = int(rng.integers(len(data) + 1)), int(rng.integers(1, 17))
        kind = rng.integers(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + 1] = rng.bytes(1)
        elif kind == 2:
            extreme = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**53, 2**63 - 1])
            data[at : at + 8] = struct.pack("<Q", int(extreme))[: 4 * int(rng.integers(1, 3))]
        elif kind == 3:
            data[at:at] = data[at : at + n]
        elif kind == 4:
            del data[at : at + n]
        elif rng.integers(6) == 0:
            del data[at:]
        else:  # what JSON is sensitive to
            data[at : at + 1] = rng.choice([*b'{}[]",:-.eE0179ntf\\'], 1).astype(np.uint8).tobytes()
    return bytes(data)


def read_safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    try:
        for tensor in file.tensors.values():
            tensor.read(0, tensor.n_bytes)
    finally:
        file.close()


def read_importance(path: Path) -> None:
    matrix = Importance(path)
    weights = matrix.of("blk.0.ffn_down_exps.weight", 3, 8)
    assert weights is None or np.isfinite(weights).all()


def safetensors_seed(path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones(4, np.float16)}
    save_file(arrays, path, {"format": "pt"})


def importance_seed(path: Path) -> None:
    met = {
        "blk.0.attn_q.weight": Activations(np.ones((1, 4)), np.array([5])),
        "blk.0.ffn_down_exps.weight": Activations(np.full((3, 8), 2.0), np.array([1, 0, 7])),
    }
    save_importance(path, met, dataset="text", chunk_count=2, chunk_size=32)


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("model.safetensors", safetensors_seed, read_safetensors),
        ("imatrix.dat", importance_seed, read_importance),
        ("imatrix.gguf", importance_seed, read_importance),
    ],
)
def test_damage_is_refused_or_harmless(
    name: str, write: Callable[[Path], None], read: Callable[[Path], None], tmp_path: Path
) -> None:
    path, rng = tmp_path / name, np.random.default_rng(1)
    write(path)
    read(path)
    seed = path.read_bytes()
    n_refused = 0
    for _ in range(DAMAGED):
        path.write_bytes(damaged(seed, rng))
        try:
            read(path)
        except Error as refused:
            n_refused += str(path) in str(refused)  # a text that names the file
    print(f"{name}: {DAMAGED} changed inputs, {n_refused} refused")
    assert n_refused > DAMAGED / 10
