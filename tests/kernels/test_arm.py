"""The ARM kernels against the scalar ones, cross-compiled and run in an emulator."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import pytest

from support.build import ROOT, cmake

BUILD = ROOT / "build" / "arm"
COMPILER = "aarch64-linux-gnu-gcc"


@pytest.fixture(scope="module")
def agree() -> list[str]:
    """The command that compares, up to the processor to emulate."""
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("tests/kernels run the ARM kernels on this machine itself")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None or shutil.which(COMPILER) is None:
        pytest.skip(f"needs {COMPILER} and qemu-aarch64: apt-get install gcc-aarch64-linux-gnu "
                    "libc6-dev-arm64-cross qemu-user-static")  # fmt: skip
    options = (
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_C_COMPILER={COMPILER}",
    )
    cmake("arm", "dgemma_kernels_agree", options=options)
    return [emulator, "-L", "/usr/aarch64-linux-gnu", "-cpu"]


def run(agree: list[str], cpu: str, argument: str) -> str:
    program = BUILD / "tests" / "native" / "dgemma_kernels_agree"
    environment = {k: v for k, v in os.environ.items() if k != "DGEMMA_ISA"}
    command = [*agree, cpu, program, argument]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["neon", "dotprod", "i8mm"])
def test_agrees_with_scalar(agree: list[str], name: str) -> None:
    text = run(agree, "max", name)
    print(text)
    assert text.startswith(f"{name}: agrees with scalar")


@pytest.mark.parametrize(
    ("cpu", "best"), [("cortex-a72", "neon"), ("neoverse-n1", "dotprod"), ("max", "i8mm")]
)
def test_what_a_processor_runs(agree: list[str], cpu: str, best: str) -> None:
    assert run(agree, cpu, "--best").strip() == best
