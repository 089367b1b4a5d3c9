"""What must be survived: calls that fail, files that shrink, sessions at once, forks, damage, wear.

The C programs of tests/native print how many cases they tried.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import dgemma
from dgemma import DiffusionGemma
from support.build import kernel_tests

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program() -> Callable[..., str]:
    """Runs a program of tests/native, which is built when first asked for; returns its output."""
    if sys.platform != "linux":
        pytest.skip("needs GNU ld's option --wrap")
    build = kernel_tests("dgemma_faults", "dgemma_shrink", "dgemma_concurrent")

    def run(name: str, *arguments: object) -> str:
        command = [build / "tests" / "native" / name, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{name} ended with {done.returncode}: {done.stdout}"
        print(done.stdout)
        return done.stdout

    return run


def test_every_call_that_can_fail_fails_once(
    program: Callable[..., str], tiny_gguf: Path, tmp_path: Path
) -> None:
    text = program("dgemma_faults", tiny_gguf, tmp_path)
    counts = {what: int(n) for what, n in re.findall(r"^(.+): (\d+) failing", text, re.MULTILINE)}
    assert set(counts) >= {"open", "create a session", "prefill and step", "save", "load"}
    assert min(counts.values()) >= 10, counts


def test_a_file_that_becomes_shorter_while_it_is_read(
    program: Callable[..., str], tiny_gguf: Path, tmp_path: Path
) -> None:
    assert "checks hold" in program("dgemma_shrink", tiny_gguf, tmp_path / "copy.gguf")


def test_sessions_at_once_cancel_and_fork(program: Callable[..., str], tiny_gguf: Path) -> None:
    assert "say what they say alone" in program("dgemma_concurrent", tiny_gguf)


def test_fork_under_python(tiny_gguf: Path) -> None:
    """A child gets an error from the parent's session, and can load the model itself."""
    source = """
import os, sys, dgemma
llm = dgemma.DiffusionGemma(sys.argv[1], n_ctx=256, n_threads=2)
llm.generate("The", max_tokens=4, seed=1)
child = os.fork()
if child == 0:
    try:
        llm.generate("The", max_tokens=4, seed=1)
    except dgemma.Error as problem:
        assert "fork" in str(problem), problem
        with dgemma.DiffusionGemma(sys.argv[1], n_ctx=256, n_threads=2) as own:
            own.generate("The", max_tokens=4, seed=1)
        llm.close()
        os._exit(0)
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
llm.generate("The", max_tokens=4, seed=1)
"""
    subprocess.run([sys.executable, "-c", source, tiny_gguf], check=True, timeout=60)


# ---- Session files -------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_gguf: Path, tmp_path: Path) -> tuple[DiffusionGemma, Path]:
    """A model whose session has encoded something, and the file that it was saved to."""
    llm = DiffusionGemma(tiny_gguf, n_ctx=256, n_threads=1)
    llm.default_session.prefill(np.arange(12) + 3)
    path = tmp_path / "session"
    llm.save(path)
    return llm, path


def test_a_session_file_with_one_bit_turned_over_is_refused(
    saved: tuple[DiffusionGemma, Path], tmp_path: Path
) -> None:
    llm, path = saved
    whole = path.read_bytes()
    damaged = tmp_path / "damaged"
    rng = np.random.default_rng(0)
    header = [(byte, bit) for byte in range(96) for bit in range(8)]
    body = [(int(b), int(rng.integers(8))) for b in rng.integers(96, len(whole), 200)]
    for byte, bit in header + body:
        changed = bytearray(whole)
        changed[byte] ^= 1 << bit
        damaged.write_bytes(changed)
        with pytest.raises((dgemma.ModelFileError, dgemma.ContextLengthError)):
            llm.load(damaged)
    for n in [*range(0, 200, 7), len(whole) - 1]:
        damaged.write_bytes(whole[:n])
        with pytest.raises(dgemma.ModelFileError):
            llm.load(damaged)
    damaged.write_bytes(whole + b"\0")
    with pytest.raises(dgemma.ModelFileError):
        llm.load(damaged)
    llm.load(path)
    assert llm.default_session.n_past == 12
    llm.close()


def test_a_session_file_of_another_model_is_refused(
    saved: tuple[DiffusionGemma, Path], gguf_file: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    from dgemma_convert import convert

    llm, path = saved
    llm.close()
    other_type = tmp_path / "tiny-q4_0.gguf"
    convert(tiny, other_type, "q4_0", progress=False)
    for file in (other_type, gguf_file("small")):
        with DiffusionGemma(file, n_ctx=0, n_threads=1) as other:
            with pytest.raises(dgemma.ModelFileError, match="another model"):
                other.load(path)
            assert other.default_session.n_past == 0


# ---- Wear ----------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Memory of this process without mapped files, after everything unused is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_after_a_thousand_requests_is_that_after_ten(tiny_gguf: Path) -> None:
    with DiffusionGemma(tiny_gguf, n_ctx=256, n_threads=1) as llm:

        def ask(n: int) -> int:
            for i in range(n):
                llm.generate(f"Request {i}", max_tokens=4, seed=i, max_denoising_steps=1)
                if i % 10 == 0:
                    with llm.session() as session:
                        session.prefill([3, 4, 5])
            return resident_bytes()

        after_ten = ask(10)
        assert ask(990) - after_ten < 1 << 20
