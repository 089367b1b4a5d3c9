"""Checkpoints, conversions and references that tests share; each is made once, when asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before NumPy and torch load: on these sizes their thread pools cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

if TYPE_CHECKING:
    import httpx

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all its workers see: what is dear is made there once (`once`)."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained checkpoint that the repository carries."""
    return REPOSITORY / "models" / "tiny"


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Callable[[str], Path]:
    """Folder of a random checkpoint, by the name of its spec in checkpoints.py."""
    from support.build import once
    from support.checkpoints import CALM, SPECS, make_checkpoint

    specs = {**SPECS, **CALM}
    return lambda name: once(
        shared / "checkpoints" / name, lambda folder: make_checkpoint(folder, specs[name])
    )


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], object]:
    """A fresh conversation with the reference for a spec's checkpoint (reference.Reference)."""
    from support.reference import Reference

    @functools.cache
    def load(name: str) -> Reference:
        return Reference.load(checkpoint(name))

    def fresh(name: str) -> Reference:
        load(name).reset()
        return load(name)

    return fresh


@pytest.fixture(scope="session")
def gguf_file(checkpoint: Callable[[str], Path], shared: Path) -> Callable[..., Path]:
    """A spec's checkpoint converted to GGUF: `gguf_file(name, outtype="f32")`."""
    from dgemma_convert import convert
    from support.build import once

    def converted(name: str, outtype: str = "f32") -> Path:
        return once(
            shared / "gguf" / f"{name}-{outtype}.gguf",
            lambda path: convert(checkpoint(name), path, outtype, progress=False),
        )

    return converted


@pytest.fixture(scope="session")
def tiny_file(tiny: Path, shared: Path) -> Callable[[str], Path]:
    """models/tiny as a file of the named type."""
    from dgemma_convert import convert
    from support.build import once

    def converted(outtype: str) -> Path:
        return once(
            shared / "tiny" / f"tiny-{outtype.upper()}.gguf",
            lambda path: convert(tiny, path, outtype, progress=False),
        )

    return converted


@pytest.fixture(scope="session")
def tiny_gguf(tiny_file: Callable[[str], Path]) -> Path:
    """models/tiny as a Q8_0 file: small enough to open many times, exact enough to answer."""
    return tiny_file("q8_0")


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[str]:
    """Address of a server with a key and a queue of two, for one file of tests."""
    from support.serving import KEY, running

    with running(tiny_gguf, "--api-key", KEY, "--max-queue", 2) as (address, _):
        yield address


@pytest.fixture
def http(server: str) -> Iterator[httpx.Client]:
    """A client of it that has the key."""
    import httpx

    from support.serving import KEY

    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server, headers=headers, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def gemma4() -> Path:
    """The folder with Gemma 4's public vocabulary and its test cases, or a skip.

    Its three files are in the source distribution of llama-cpp-python 0.3.36, under
    vendor/llama.cpp/models, as ggml-vocab-gemma-4.gguf, .gguf.inp and .gguf.out.
    """
    named = os.environ.get("DGEMMA_GEMMA4_VOCAB")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "gemma4"
    if not (folder / "vocab.gguf").is_file():
        pytest.skip(
            "needs Gemma 4's vocabulary: put ggml-vocab-gemma-4.gguf, .gguf.inp and .gguf.out from "
            "the source distribution of llama-cpp-python 0.3.36 into a folder as vocab.gguf, "
            "vectors.inp and vectors.out, and name it in DGEMMA_GEMMA4_VOCAB"
        )
    return folder


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """libdgemma_cuda.so: the one named by DGEMMA_TEST_CUDA, or one that emulates the device."""
    from support import cuda_device

    named = os.environ.get("DGEMMA_TEST_CUDA")
    return Path(named) if named else cuda_device.build()


@pytest.fixture
def cuda(cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens a model on the device; options as of engine.open_model."""
    from support.engine import open_model

    monkeypatch.setenv("DGEMMA_CUDA_LIBRARY", str(cuda_library))
    return lambda path, **options: open_model(path, **{"backend": "cuda", "n_ctx": 256, **options})


@pytest.fixture
def device(cuda_library: Path) -> Iterator[Any]:
    """The emulated device (cuda_device.Device), whole again afterwards."""
    from support import cuda_device

    if "DGEMMA_TEST_CUDA" in os.environ:
        pytest.skip("steers the emulated device")
    found = cuda_device.Device(cuda_library)
    found.heal()
    yield found
    found.idle(False)
    found.heal()


@pytest.fixture(scope="session")
def kernel_library() -> ctypes.CDLL:
    """The CPU kernels as plain functions (kernel_api)."""
    from support import kernel_api

    return kernel_api.load()


_ARM = platform.machine() in ("aarch64", "arm64")


@pytest.fixture(
    params=["scalar", "neon", "dotprod", "i8mm"]
    if _ARM
    else ["scalar", "avx2", "avxvnni", "avx512", "amx"]
)
def kernels(
    kernel_library: ctypes.CDLL, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> ctypes.CDLL:
    """The same, running the kernels of one instruction set."""
    monkeypatch.setenv("DGEMMA_ISA", request.param)
    if kernel_library.test_isa().decode() != request.param:
        pytest.skip(f"this machine does not run {request.param}")
    return kernel_library
