"""What this machine has: processor, memory, disk, NVIDIA's driver and its GPUs."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NVML = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
_NVIDIA = "0x10de"  # of PCI devices


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it; `capability` is the compute capability, such as "8.9"."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    capability: str


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver; `cuda` is the highest CUDA version it supports."""

    version: str
    cuda: str
    gpus: list[Gpu] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """Sizes are in bytes; `available` is what can be had without swapping, page cache included."""

    system: str
    wsl: bool
    cpu: str
    logical_cpus: int
    total: int
    available: int


def describe() -> Machine:
    """What there is."""
    meminfo = dict(_numbers(Path("/proc/meminfo")))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _memory_limit()
    total = min(total, limit) if limit else total
    available = meminfo.get("MemAvailable", 0) * 1024 or total
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        wsl="microsoft" in platform.release().lower(),
        cpu=_cpu_name(),
        logical_cpus=_logical_cpus(),
        total=total,
        available=min(available, total),
    )


def _logical_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _numbers(path: Path) -> Iterator[tuple[str, int]]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            yield name, int(words[0])


def _memory_limit() -> int:
    """Bytes that this process's group may use; 0: no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        return int(text) if text.isdigit() else 0
    return 0


def has_nvidia_card() -> bool:
    """Whether an NVIDIA device is on the PCI bus, with a driver or without."""
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            if vendor.read_text(encoding="ascii").strip() != _NVIDIA:
                continue
            kind = vendor.with_name("class").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if kind.startswith("0x03"):  # a display controller, and not its sound device
            return True
    return False


def driver(libraries: tuple[str, ...] = NVML) -> Driver | None:
    """NVIDIA's driver and all of its GPUs, hidden ones too; None where it is not installed."""
    for name in libraries:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if library.nvmlInit_v2() == 0:
            try:
                return _driver(library)
            finally:
                library.nvmlShutdown()
    return None


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("total", "free", "used")]


def _driver(nvml: ctypes.CDLL) -> Driver:
    version, cuda, count = ctypes.create_string_buffer(80), ctypes.c_int(), ctypes.c_uint()
    nvml.nvmlSystemGetDriverVersion(version, 80)
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    found = [gpu for index in range(count.value) if (gpu := _gpu(nvml, index)) is not None]
    supported = f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"
    return Driver(version.value.decode("utf-8", "replace"), supported, found)


def _gpu(nvml: ctypes.CDLL, index: int) -> Gpu | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None
    nvml.nvmlDeviceGetName(handle, name, 96)
    nvml.nvmlDeviceGetUUID(handle, uuid, 96)
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(
        index,
        name.value.decode("utf-8", "replace"),
        uuid.value.decode("utf-8", "replace"),
        memory.total,
        memory.free,
        f"{major.value}.{minor.value}",
    )
