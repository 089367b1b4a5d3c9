"""The C library as other programs use it: installed, found by pkg-config, linked both ways."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dgemma
from support.build import ROOT, kernel_tests, locked

PROMPT = [2, 106, 64, 108]


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix() -> Path:
    """Where the library is installed."""
    folder = kernel_tests("dgemma", "dgemma_engine")
    with locked(folder):
        run("cmake", "--install", folder, "--prefix", folder / "prefix")
    return folder / "prefix"


@pytest.fixture(scope="module")
def pkgconfig(prefix: Path) -> Path:
    """The folder of dgemma.pc."""
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    (found,) = prefix.rglob("dgemma.pc")
    return found.parent


def test_what_is_installed(prefix: Path) -> None:
    names = {path.name for path in prefix.rglob("*") if path.is_file() and not path.is_symlink()}
    library = f"libdgemma.so.{dgemma.__version__}"
    assert names == {"dgemma.h", "dgemma.pc", "libdgemma.a", library}
    header = next(prefix.rglob("dgemma.h"))
    for language in ("c", "c++"):
        flags = ("-Wall", "-Wextra", "-Wundef", "-pedantic", "-Werror", "-fsyntax-only")
        run(shutil.which("cc") or "gcc", "-x", language, *flags, header)


def test_only_the_api_is_exported(prefix: Path) -> None:
    library = next(path for path in prefix.rglob("libdgemma.so.*") if not path.is_symlink())
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
    header = (ROOT / "native/include/dgemma.h").read_text(encoding="utf-8")
    assert len(symbols) > 40
    assert [s for s in symbols if f"{s}(" not in header] == []


@pytest.mark.parametrize("linked", ["shared", "static"])
def test_the_example_answers_like_python(
    linked: str, pkgconfig: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    path = {"PKG_CONFIG_PATH": str(pkgconfig)}
    how = ("--static",) if linked == "static" else ()
    flags = run("pkg-config", *how, "--cflags", "--libs", "dgemma", **path).split()
    folder = run("pkg-config", "--variable=libdir", "dgemma", **path).strip()
    if linked == "static":
        flags = [str(Path(folder) / "libdgemma.a") if f == "-ldgemma" else f for f in flags]
    program = tmp_path / "generate"
    run("cc", "-Wall", "-Wextra", "-Werror", ROOT / "examples/generate.c", *flags, "-o", program)
    out = run(program, tiny_gguf, 24, *PROMPT, LD_LIBRARY_PATH=folder)

    with dgemma.DiffusionGemma(tiny_gguf, n_ctx=0, backend="cpu") as model:
        answer = model.generate(PROMPT, max_tokens=24, seed=1)
    assert [int(token) for token in out.split()] == list(answer.tokens)


def test_the_example_says_what_is_wrong(pkgconfig: Path, tmp_path: Path) -> None:
    path = {"PKG_CONFIG_PATH": str(pkgconfig)}
    flags = run("pkg-config", "--cflags", "--libs", "dgemma", **path).split()
    folder = run("pkg-config", "--variable=libdir", "dgemma", **path).strip()
    program = tmp_path / "generate"
    run("cc", ROOT / "examples/generate.c", *flags, "-o", program)
    done = subprocess.run(
        [program, tmp_path / "absent.gguf", "8", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": folder},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("generate: ")
    assert "absent.gguf" in done.stderr
