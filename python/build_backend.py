"""The build backend: scikit-build-core's, which brings the CUDA compiler from pip.

A machine with an NVIDIA driver and Python alone has no nvcc. Where there is a GPU (or
`-Ccmake.define.DGEMMA_CUDA=ON`) and no toolkit that can compile for it, NVIDIA's own wheels of one
release are requirements of the build: pip puts them into the build's environment, and takes them
away with it. Otherwise this is scikit-build-core.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Config = dict[str, Any] | None

RELEASE = (13, 0)
DRIVER = 580
"""The oldest driver that runs programs of this release."""
CAPABILITY = (8, 0)
"""The oldest compute capability that the kernels are written for."""
COMPILER = [
    f"nvidia-{name}=={RELEASE[0]}.{RELEASE[1]}.*"
    for name in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
]
TOOLKITS = (Path("/usr/local/cuda/bin/nvcc"), Path("/opt/cuda/bin/nvcc"))
"""Where distributions and NVIDIA's installer put it without touching the PATH."""


class Gpu(NamedTuple):
    """A card, as nvidia-smi tells it."""

    name: str
    capability: tuple[int, int]
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


class Plan(NamedTuple):
    """How the CUDA backend is compiled: by pip's compiler, by `nvcc`, or, without both, not."""

    packages: list[str]
    nvcc: Path | None
    note: str


def gpus() -> list[Gpu]:
    """The GPUs of this machine; none where there is no driver."""
    program = shutil.which("nvidia-smi") or "/usr/lib/wsl/lib/nvidia-smi"
    question = "--query-gpu=name,compute_cap,driver_version"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [program, question, "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
        rows = re.findall(r"^(.+), (\d+)\.(\d), ([\d.]+)\s*$", done.stdout, re.MULTILINE)
        if done.returncode == 0:
            return [Gpu(name, (int(a), int(b)), driver) for name, a, b, driver in rows]
    return []


def defined(config: Config, name: str) -> str:
    """The CMake variable `name` as pip's options or the environment give it; empty without."""
    value = (config or {}).get(f"cmake.define.{name}", "")
    words = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    words += (f"-D{word}" for word in os.environ.get("SKBUILD_CMAKE_DEFINE", "").split(";"))
    for word in words:
        found = re.fullmatch(rf"-D{name}(?::\w+)?=(.*)", word)
        value = found[1] if found and not value else value
    return str(value)


def toolkit(config: Config) -> Path | None:
    """The nvcc of this machine: the one that is named, on the PATH, or where toolkits are put.

    None as well where DGEMMA_CUDA_COMPILER=pip asks for pip's.
    """
    if os.environ.get("DGEMMA_CUDA_COMPILER") == "pip":
        return None
    named = defined(config, "CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX")
    found = named or shutil.which("nvcc")
    if found:
        return Path(found)
    homes = [os.environ[n] for n in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(n)]
    places = [*(Path(home) / "bin" / "nvcc" for home in homes), *TOOLKITS]
    return next((place for place in places if place.is_file()), None)


def lacks(nvcc: Path, cards: list[Gpu]) -> str:
    """What a toolkit lacks for these cards, as a sentence; empty if nothing."""
    try:
        said, listed = (
            subprocess.run([nvcc, option], capture_output=True, text=True, timeout=60).stdout
            for option in ("--version", "--list-gpu-arch")
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{nvcc} does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return f"{nvcc} does not say its release"
    named = f"CUDA {release[1]}.{release[2]} ({nvcc})"
    for card in cards:
        if f"compute_{card.capability[0]}{card.capability[1]}" not in listed.split():
            return f"{named} cannot compile for {card}"
    if (int(release[1]), int(release[2])) < RELEASE:
        return f"{named} is older than {RELEASE[0]}.{RELEASE[1]}, which the kernels are written for"
    return ""


def plan(config: Config = None) -> Plan:
    """Decides about the CUDA backend from what is asked for and what this machine has."""
    asked = defined(config, "DGEMMA_CUDA").upper() or "AUTO"
    cards = gpus()
    usable = [card for card in cards if card.capability >= CAPABILITY]
    if asked not in ("AUTO", "ON") or (asked == "AUTO" and not cards):
        return Plan([], None, "")
    if asked == "AUTO" and not usable:
        return Plan([], None, f"{cards[0]} is not used: 8.0 (GeForce RTX 30) or later is needed")
    nvcc = toolkit(config)
    missing = lacks(nvcc, usable) if nvcc else "no CUDA toolkit is used"
    named = defined(config, "CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX")
    if nvcc and (named or not missing):
        return Plan([], nvcc, missing)
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return Plan([], nvcc, f"{missing}, and pip has no CUDA compiler for this system")
    old = [card.driver for card in usable if int(card.driver.split(".")[0]) < DRIVER]
    if old and asked == "AUTO":
        return Plan(
            [], None, f"the GPU is not used: driver {old[0]} is too old for CUDA "
            f"{RELEASE[0]}.{RELEASE[1]}; install {DRIVER} or later, and install dgemma again"
        )  # fmt: skip
    return Plan(COMPILER, None, f"{missing}: taking NVIDIA's compiler from pip")


def compiler_of_pip() -> Path | None:
    """The nvcc of NVIDIA's wheels in this environment."""
    places = (Path(folder) / "nvidia" / f"cu{RELEASE[0]}" for folder in sys.path)
    return next((p / "bin" / "nvcc" for p in places if (p / "bin" / "nvcc").is_file()), None)


@contextlib.contextmanager
def cuda_environment(config: Config) -> Iterator[dict[str, Any]]:
    """The environment and the options for CMake to compile CUDA as planned."""
    planned = plan(config)
    config = dict(config or {})
    if planned.note:
        print(f"dgemma: {planned.note}", file=sys.stderr, flush=True)
    nvcc, before = planned.nvcc, dict(os.environ)
    if planned.packages:
        nvcc = compiler_of_pip()
        if nvcc is None:
            raise SystemExit(
                f"dgemma: install the compiler first: pip install {' '.join(COMPILER)}"
            )
        # The wheels' libraries lie in lib, where their nvcc looks in lib64.
        flags = (os.environ.get("NVCC_APPEND_FLAGS", ""), f"-L{nvcc.parents[1] / 'lib'}")
        os.environ["NVCC_APPEND_FLAGS"] = " ".join(flags).strip()
    if nvcc is not None:
        os.environ["CUDACXX"] = str(nvcc)
    elif not defined(config, "DGEMMA_CUDA"):
        config["cmake.define.DGEMMA_CUDA"] = "OFF"  # the reason is said above
    try:
        yield config
    finally:
        os.environ.clear()
        os.environ.update(before)


def get_requires_for_build_wheel(config_settings: Config = None) -> list[str]:
    """PEP 517: scikit-build-core's requirements, and the CUDA compiler where it is needed."""
    return [*_build.get_requires_for_build_wheel(config_settings), *plan(config_settings).packages]


def get_requires_for_build_editable(config_settings: Config = None) -> list[str]:
    """PEP 660: the same."""
    required = _build.get_requires_for_build_editable(config_settings)
    return [*required, *plan(config_settings).packages]


def build_wheel(
    wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None
) -> str:
    """PEP 517: builds the wheel."""
    with cuda_environment(config_settings) as config:
        return str(_build.build_wheel(wheel_directory, config, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None
) -> str:
    """PEP 660: builds the wheel of an editable installation."""
    with cuda_environment(config_settings) as config:
        return str(_build.build_editable(wheel_directory, config, metadata_directory))
