"""Which CUDA compiler a build takes, on machines that are made of two small programs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "python" / "build_backend.py"
ADA = "NVIDIA GeForce RTX 4070, 8.9, 581.42"
BLACKWELL = "NVIDIA GeForce RTX 5090, 12.0, 581.42"
OLD_DRIVER = "NVIDIA GeForce RTX 4070, 8.9, 550.90.07"
TURING = "NVIDIA GeForce RTX 2060, 7.5, 581.42"
ON = {"cmake.define.DGEMMA_CUDA": "ON"}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_backend", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOOLKITS", ())
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A PATH with these cards, and an nvcc of this release that knows these capabilities."""
    for name in ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "CMAKE_ARGS", "DGEMMA_CUDA_COMPILER"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def program(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    def made(*cards: str, release: str = "", capabilities: str = "80 86 89 90 100 120") -> Path:
        if cards:
            program("nvidia-smi", "printf '%s\\n' " + " ".join(f"'{card}'" for card in cards))
        if release:
            listed = " ".join(f"compute_{n}" for n in capabilities.split())
            said = f"echo 'Cuda compilation tools, release {release}, V{release}.1'"
            program("nvcc", f"case $1 in --version) {said};; *) printf '%s\\n' {listed};; esac")
        return folder / "nvcc"

    return made


def test_without_a_gpu_nothing_is_added(backend: ModuleType, machine: Callable[..., Path]) -> None:
    machine()
    assert backend.plan() == ([], None, "")
    machine(release="13.0")
    assert backend.plan() == ([], None, "")


def test_a_gpu_without_a_toolkit_takes_the_compiler_from_pip(
    backend: ModuleType, machine: Callable[..., Path]
) -> None:
    machine(ADA)
    assert backend.plan().packages == [
        "nvidia-cuda-nvcc==13.0.*",
        "nvidia-cuda-crt==13.0.*",
        "nvidia-cuda-runtime==13.0.*",
        "nvidia-cuda-cccl==13.0.*",
        "nvidia-nvvm==13.0.*",
    ]
    assert set(backend.COMPILER) < set(backend.get_requires_for_build_wheel())
    assert set(backend.COMPILER) < set(backend.get_requires_for_build_editable())


def test_a_toolkit_that_is_there_is_used(
    backend: ModuleType, machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = machine(ADA, release="13.1")
    assert backend.plan() == ([], nvcc, "")
    with backend.cuda_environment(None) as config:
        assert backend.os.environ["CUDACXX"] == str(nvcc)
        assert config == {}
    assert "CUDACXX" not in backend.os.environ

    # off the PATH, where distributions put it
    monkeypatch.setattr(backend, "TOOLKITS", (nvcc,))
    monkeypatch.setenv("PATH", str(machine(ADA).parent))
    nvcc.rename(nvcc.with_name("kept"))
    monkeypatch.setattr(backend, "TOOLKITS", (nvcc.with_name("kept"),))
    assert backend.plan().nvcc == nvcc.with_name("kept")
    monkeypatch.setenv("DGEMMA_CUDA_COMPILER", "pip")
    assert backend.plan().packages == backend.COMPILER


@pytest.mark.parametrize(
    ("release", "capabilities", "lack"),
    [
        ("12.4", "80 86 89 90", "cannot compile for NVIDIA GeForce RTX 5090"),
        ("12.8", "80 86 89 90 120", "is older than 13.0"),
    ],
)  # fmt: skip
def test_a_toolkit_that_is_too_old_is_named_with_what_it_lacks(
    backend: ModuleType,
    machine: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    capabilities: str,
    lack: str,
) -> None:
    nvcc = machine(BLACKWELL, release=release, capabilities=capabilities)
    found = backend.plan()
    assert found.packages == backend.COMPILER
    assert f"CUDA {release} ({nvcc}) {lack}" in found.note
    # one that is named is taken nevertheless
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert backend.plan().nvcc == nvcc
    assert lack in backend.plan().note


def test_a_card_or_a_driver_that_is_too_old_is_named(
    backend: ModuleType, machine: Callable[..., Path]
) -> None:
    machine(OLD_DRIVER)
    assert backend.plan() == (
        [],
        None,
        "the GPU is not used: driver 550.90.07 is too old for CUDA 13.0; install 580 or later, and "
        "install dgemma again",
    )
    machine(TURING)
    found = backend.plan()
    assert not found.packages
    assert "RTX 2060 (compute capability 7.5) is not used" in found.note
    with backend.cuda_environment(None) as config:
        assert config == {"cmake.define.DGEMMA_CUDA": "OFF"}
    machine(TURING, ADA)
    assert backend.plan().packages == backend.COMPILER


def test_what_is_asked_for_decides(
    backend: ModuleType, machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    assert backend.plan(ON).packages == backend.COMPILER
    machine(ADA)
    assert backend.plan({"cmake.define.DGEMMA_CUDA": "OFF"}) == ([], None, "")
    monkeypatch.setenv("CMAKE_ARGS", "-G Ninja -DDGEMMA_CUDA:STRING=OFF")
    assert backend.plan() == ([], None, "")
    assert backend.plan(ON).packages == backend.COMPILER
    monkeypatch.setattr(backend.sys, "platform", "darwin")
    assert backend.plan(ON) == (
        [],
        None,
        "no CUDA toolkit is used, and pip has no CUDA compiler for this system",
    )


def test_without_isolation_the_compiler_must_be_there(
    backend: ModuleType,
    machine: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(ADA)
    with (
        pytest.raises(SystemExit, match=r"pip install nvidia-cuda-nvcc==13\.0\.\*"),
        backend.cuda_environment(None),
    ):
        pass
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setattr(backend.sys, "path", [str(tmp_path)])
    with backend.cuda_environment(ON) as config:
        assert backend.os.environ["CUDACXX"] == str(nvcc)
        assert backend.os.environ["NVCC_APPEND_FLAGS"] == f"-L{tmp_path / 'nvidia/cu13/lib'}"
        assert config == ON
