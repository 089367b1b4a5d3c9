"""Source distribution and wheels: what is in them, that they can be reproduced, and installed.

All of it builds, and installs from a package index: `make test-packaging`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from support.hub import REPOSITORY as REPOSITORY_NAME
from support.hub import serving

QUESTION = "What is the capital of France?"
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
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run(python, "-m", "pip", "install", "-q", *offline, "dgemma[server,hub]", PATH="/nowhere")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"from a folder of wheels: {after.ru_utime - before.ru_utime:.1f} s user, "
        f"{after.ru_stime - before.ru_stime:.1f} s system, {time.monotonic() - began:.0f} s"
    )
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


def bare(empty: Path, home: Path, **more: str) -> dict[str, str]:
    """All of a program's environment: no compilers, nothing of this machine's settings."""
    return {"PATH": str(empty), "HOME": str(home), "LANG": "C.UTF-8", **more}


def dgemma(empty: Path, environment: dict[str, str], *arguments: object, said: str = "") -> str:
    done = subprocess.run(
        [empty / "dgemma", *map(str, arguments)],
        cwd=environment["HOME"],
        env=environment,
        input=said,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_installs_from_a_folder_and_answers(empty: Path, tmp_path: Path) -> None:
    assert "No broken requirements" in run(empty / "python", "-m", "pip", "check")
    environment = bare(empty, tmp_path)
    model = tmp_path / "tiny.gguf"
    convert = ("convert", REPOSITORY / "models/tiny", "--outtype", "q8_0", "--outfile", model)
    dgemma(empty, environment, *convert)
    said = dgemma(
        empty, environment, "generate", "-m", model, "--chat", "--seed", "1", "-p", QUESTION
    )
    assert "Paris" in said
    assert "fits" in dgemma(empty, environment, "doctor", "-m", model)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"], "nothing else is written"

    server = subprocess.Popen(
        [empty / "dgemma", "serve", "-m", model, "--port", "0", "-c", "512"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        address = None
        while address is None:
            line = server.stderr.readline()
            assert line, f"the server ended with {server.wait(60)}"
            address = re.search(r"dgemma: (http://\S+)", line)
        body = {"messages": [{"role": "user", "content": QUESTION}], "seed": 1}
        request = urllib.request.Request(
            f"{address[1]}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            assert "Paris" in answer.read().decode()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.stderr.close()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_one_command_from_a_repository_to_an_answer(empty: Path, tmp_path: Path) -> None:
    home, files = tmp_path / "home", tmp_path / "files"
    home.mkdir()
    shutil.copytree(REPOSITORY / "models/tiny", files, ignore=shutil.ignore_patterns("*.py"))
    with serving(files) as hub:
        environment = bare(empty, home, HF_ENDPOINT=hub.address, HF_HUB_DISABLE_XET="1")
        command = ("run", f"{REPOSITORY_NAME}:Q8_0", "--seed", "1", "-c", "512")
        assert "Paris" in dgemma(empty, environment, *command, said=f"{QUESTION}\n")
        again = {**environment, "HF_HUB_OFFLINE": "1"}
        assert "Paris" in dgemma(empty, again, *command, said=f"{QUESTION}\n")
    assert {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()} == {
        (".cache", "huggingface"),
        (".cache", "dgemma"),
    }


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


def test_the_script_builds_the_cuda_wheel(wheel: Path) -> None:
    """For one architecture: all of them, as in a release, take a quarter of an hour."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    for path in (REPOSITORY / "dist").glob("dgemma_cuda-*"):
        path.unlink()
    run(".ci/wheels", "cuda", DGEMMA_CUDA_ARCHITECTURES="90-real")
    (built,) = (REPOSITORY / "dist").glob("dgemma_cuda-*.whl")
    assert "-py3-none-manylinux" in built.name
    with zipfile.ZipFile(built) as archive:
        library = archive.read("dgemma_cuda/libdgemma_cuda.so")
    assert b"sm_90" in library
    assert b"sm_120" not in library
    print(f"{built.name}: {built.stat().st_size / 1e6:.2f} MB")
