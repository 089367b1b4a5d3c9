"""libdgemma_cuda.so whose device is emulated on the CPU (tests/cuda/emulation), and its control."""

from __future__ import annotations

import ctypes
from pathlib import Path

from support.build import ROOT, cmake

EMULATION = ROOT / "tests" / "cuda" / "emulation"

OUT_OF_MEMORY, LOST, CANNOT_CAPTURE = 2, 719, 900


def build() -> Path:
    """Compiles the kernels as they are, and the backend's host code, with a C++ compiler.

    What has not changed is not compiled again; workers that ask at once wait for each other.
    """
    folder = cmake("cuda-emulation", "dgemma_cuda", options=(), source=EMULATION)
    return folder / "libdgemma_cuda.so"


class Device:
    """The emulated device (runtime.cpp)."""

    def __init__(self, library: Path) -> None:
        self._c = ctypes.CDLL(str(library))
        self._c.emulation_fail_at.argtypes = [ctypes.c_long, ctypes.c_int]
        self._c.emulation_lose.argtypes = [ctypes.c_int]
        self._c.emulation_allocated.argtypes = [ctypes.c_int]
        for name in ("calls", "alive", "sent", "steps_captured", "steps_updated", "steps_launched"):
            getattr(self._c, f"emulation_{name}").restype = ctypes.c_long
        for name in ("allocated", "peak"):
            getattr(self._c, f"emulation_{name}").restype = ctypes.c_size_t

    def fail_at(self, n: int, how: int) -> None:
        """Makes the n-th call of the runtime from now on fail: `LOST` with all that follow."""
        self._c.emulation_fail_at(n, how)

    def heal(self) -> None:
        """Nothing fails any more; `calls` starts from 0."""
        self._c.emulation_fail_at(0, 0)

    def idle(self, on: bool) -> None:
        """Whether kernels are only counted: for tests of what the host does."""
        self._c.emulation_idle(int(on))

    def calls(self) -> int:
        """Calls of the runtime since the last `heal` or `fail_at`."""
        return int(self._c.emulation_calls())

    def lose(self, device: int) -> None:
        """Every call of that device fails from now on."""
        self._c.emulation_lose(device)

    def sent(self) -> int:
        """Copies from one device to another so far."""
        return int(self._c.emulation_sent())

    def allocated(self, device: int = -1) -> int:
        """Bytes in use of one device's memory, or of all."""
        return int(self._c.emulation_allocated(device))

    def peak(self) -> int:
        """The most bytes of the first device since this was asked last."""
        return int(self._c.emulation_peak())

    def alive(self) -> int:
        """Allocations, streams, events and graphs that are not given back yet."""
        return int(self._c.emulation_alive())

    def steps(self) -> tuple[int, int, int]:
        """Denoising steps captured, taken over by the graph of another, and launched again."""
        c = self._c
        return (
            int(c.emulation_steps_captured()),
            int(c.emulation_steps_updated()),
            int(c.emulation_steps_launched()),
        )
