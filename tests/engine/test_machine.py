"""What the engine takes of a machine: cores within affinity and control groups."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

NO_LIMIT = 2**64 - 1


@pytest.fixture
def limits(kernel_library: ctypes.CDLL, tmp_path: Path):
    """A made-up machine: `limits(lines of /proc/self/cgroup, files)` gives (cpus, memory)."""
    for function in (kernel_library.test_cgroup_cpus, kernel_library.test_cgroup_memory):
        function.restype = ctypes.c_uint64
        function.argtypes = [ctypes.c_char_p, ctypes.c_char_p]

    def read(groups: str, files: dict[str, str]) -> tuple[int, int]:
        listing, root = tmp_path / "cgroup", tmp_path / "root"
        listing.write_text(groups)
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text + "\n")
        arguments = os.fsencode(listing), os.fsencode(root)
        return (
            kernel_library.test_cgroup_cpus(*arguments),
            kernel_library.test_cgroup_memory(*arguments),
        )

    return read


def test_version_2_takes_the_smallest_limit_on_the_way_up(limits) -> None:
    files = {
        "cpu.max": "max 100000",
        "a/cpu.max": "150000 100000",
        "a/b/cpu.max": "400000 100000",
        "a/memory.max": "max",
        "a/b/memory.max": "1073741824",
    }
    assert limits("0::/a/b\n", files) == (1500, 2**30)


def test_version_2_in_a_container_reads_the_mount_itself(limits) -> None:
    assert limits("0::/../x\n", {"cpu.max": "50000 100000"}) == (500, NO_LIMIT)


def test_version_1_has_a_folder_for_each_controller(limits) -> None:
    files = {
        "cpu/job/cpu.cfs_quota_us": "300000",
        "cpu/job/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/job/memory.limit_in_bytes": "4096",
    }
    assert limits("4:memory:/job\n3:cpu,cpuacct:/job\n", files) == (3000, 4096)


@pytest.mark.parametrize("text", ["", "max", "abc", "-1 100000", "100000 0", "100000"])
def test_what_is_no_limit(limits, text: str) -> None:
    assert limits("0::/\n", {"cpu.max": text}) == (NO_LIMIT, NO_LIMIT)


def test_no_control_groups_at_all(limits) -> None:
    assert limits("", {}) == (NO_LIMIT, NO_LIMIT)
    assert limits("nonsense\n7:cpu\n" + "x" * 9000, {}) == (NO_LIMIT, NO_LIMIT)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's affinity masks")
def test_threads_follow_the_affinity_mask(tiny_gguf: Path) -> None:
    program = (
        "import dgemma, sys\n"
        "with dgemma.DiffusionGemma(sys.argv[1], n_ctx=256) as llm:\n"
        "    print(llm.default_session.n_threads)"
    )
    one = min(os.sched_getaffinity(0))
    found = subprocess.run(
        [sys.executable, "-c", program, tiny_gguf],
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "1"


def test_threads_are_what_was_asked_for(tiny_gguf: Path) -> None:
    import dgemma

    with dgemma.DiffusionGemma(tiny_gguf, n_ctx=256, n_threads=3) as llm:
        assert llm.default_session.n_threads == 3
    with pytest.raises(ValueError, match="n_threads is -2"):
        dgemma.DiffusionGemma(tiny_gguf, n_ctx=256, n_threads=-2)


def _cores(
    library: ctypes.CDLL, folder: Path, cpus: list[int], files: dict[str, str], core_of: list[int]
) -> int:
    """What the engine counts on a made-up machine whose logical processor i is in core_of[i]."""
    for cpu, core in enumerate(core_of):
        files = files | {
            f"system/cpu/cpu{cpu}/topology/core_id": str(core),
            f"system/cpu/cpu{cpu}/topology/physical_package_id": "0",
        }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    numbers = (ctypes.c_int * len(cpus))(*cpus)
    return library.test_performance_cores(os.fsencode(folder), numbers, len(cpus))


def test_hyper_threads_share_a_core(kernel_library: ctypes.CDLL, tmp_path: Path) -> None:
    cores = [0, 1, 2, 3, 0, 1, 2, 3]
    assert _cores(kernel_library, tmp_path, list(range(8)), {}, cores) == 4
    assert _cores(kernel_library, tmp_path, [0, 4, 1], {}, cores) == 2


def test_intels_efficiency_cores_are_not_counted(
    kernel_library: ctypes.CDLL, tmp_path: Path
) -> None:
    """Six performance cores with two threads each, and two groups of four efficiency cores."""
    cores = [0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, *range(24, 32)]
    files = {"cpu_core/cpus": "0-11", "cpu_atom/cpus": "12-15,16-19"}
    assert _cores(kernel_library, tmp_path, list(range(20)), files, cores) == 6
    # A process that may run on efficiency cores only has those.
    assert _cores(kernel_library, tmp_path, [12, 13, 17], files, cores) == 3


def test_capacities_tell_slow_cores(kernel_library: ctypes.CDLL, tmp_path: Path) -> None:
    """One large core, three nearly as fast, four small ones."""
    capacities = [1024, 900, 900, 900, 325, 325, 325, 325]
    files = {
        f"system/cpu/cpu{cpu}/cpu_capacity": str(value) for cpu, value in enumerate(capacities)
    }
    assert _cores(kernel_library, tmp_path, list(range(8)), files, list(range(8))) == 4


def test_nothing_known_counts_every_processor(kernel_library: ctypes.CDLL, tmp_path: Path) -> None:
    assert _cores(kernel_library, tmp_path, [0, 1, 2], {}, []) == 3
