"""Source distribution and wheels: what is in them, that they can be reproduced, and installed.

All of it builds, and installs from a package index: `make test-packaging`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux"),
]


def run(*command: object, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{words}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def digests() -> dict[str, str]:
    found = [*(REPOSITORY / "dist").glob("dgemma-*")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def dist() -> Path:
    for path in (REPOSITORY / "dist").glob("dgemma-*"):
        path.unlink()
    run(".ci/wheels")
    return REPOSITORY / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("dgemma-*.whl")
    return path


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with dgemma from a folder of wheels; neither network nor compilers."""
    folder = tmp_path_factory.mktemp("offline")
    wheels = folder / "wheels"
    run(sys.executable, "-m", "pip", "download", "-q", "-d", wheels, f"{wheel}[server,hub]")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    offline = ("--no-index", "--find-links", wheels)
    run(python, "-m", "pip", "install", "-q", *offline, "dgemma[server,hub]", PATH="/nowhere")
    return folder / "venv" / "bin"


def test_the_wheel_runs_on_every_linux_since_2018(wheel: Path) -> None:
    platform = os.uname().machine
    assert wheel.name.startswith("dgemma-0.1.0-cp310-abi3-")
    assert f"manylinux_2_28_{platform}" in wheel.name
    shown = run(REPOSITORY / "build/wheels/venv/bin/auditwheel", "show", wheel)
    assert "manylinux_2_28" in shown.replace("\n", " ") or "manylinux_2_1" in shown
    names = zipfile.ZipFile(wheel).namelist()
    page = {f"dgemma/server/page/{name}" for name in ("index.html", "style.css", "form.js")}
    assert {"dgemma/_dgemma.abi3.so", "dgemma/py.typed", *page} <= {*names}
    assert not [
        name for name in names if not name.startswith(("dgemma/", "dgemma_convert/", "dgemma-"))
    ]
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")


def test_the_same_sources_give_the_same_bytes(dist: Path) -> None:
    before = digests()
    assert len(before) == 2
    run(".ci/wheels")
    assert digests() == before


def test_the_source_distribution_holds_what_a_build_needs(dist: Path) -> None:
    (path,) = dist.glob("dgemma-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "CMakeLists.txt", "LICENSE", "python/build_backend.py", "python/build_cffi.py",
        "native/include/dgemma.h", "native/cuda/CMakeLists.txt",
        "native/cuda/package/pyproject.toml",
        "python/dgemma/__init__.py", "convert/dgemma_convert/__init__.py",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(("build/", "dist/", "models/tiny/"))]
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def test_installs_from_a_folder_and_answers(empty: Path, tmp_path: Path) -> None:
    assert "No broken requirements" in run(empty / "python", "-m", "pip", "check")
    outside = {"PATH": str(empty), "HOME": str(tmp_path), "PYTHONPATH": ""}
    model = tmp_path / "tiny.gguf"
    convert = ("convert", REPOSITORY / "models/tiny", "--outtype", "q8_0", "--outfile", model)
    run(empty / "dgemma", *convert, **outside)
    said = run(
        *(empty / "dgemma", "generate", "-m", model, "--chat", "--seed", "1"),
        *("-p", "What is the capital of France?"),
        **outside,
    )
    assert "Paris" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"], "nothing else is written"


def test_the_compiler_from_pip_builds_the_cuda_backend(tmp_path: Path) -> None:
    """One architecture, with no nvcc on the PATH."""
    path = os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not (Path(folder) / "nvcc").exists()
    )
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, REPOSITORY),
        "-Ccmake.define.DGEMMA_CUDA=ON",
        "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=86-real",
        PATH=path,
        DGEMMA_CUDA_COMPILER="pip",
    )
    (wheel,) = tmp_path.glob("dgemma-*.whl")
    zipfile.ZipFile(wheel).extract("dgemma/libdgemma_cuda.so", tmp_path)
    library = (tmp_path / "dgemma" / "libdgemma_cuda.so").read_bytes()
    assert b"sm_86" in library
    assert b"sm_90" not in library
