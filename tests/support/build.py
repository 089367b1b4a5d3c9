"""What tests share is made once, by whichever worker asks first: programs, libraries, files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder`, which need not exist yet."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, a file or a folder, which `make` writes where nobody has yet.

    It is written beside and renamed: what is there is whole.
    """
    with locked(path):
        if not path.exists():
            unfinished = path.with_name(f"unfinished-{path.name}")
            make(unfinished)
            unfinished.rename(path)
    return path


def cmake(name: str, *targets: str, options: tuple[str, ...] = (), source: Path = ROOT) -> Path:
    """Builds `targets` of the project in `source` in build/`name`, and returns that folder."""
    folder = ROOT / "build" / name
    if source == ROOT:
        options = ("-DDGEMMA_TESTS=ON", *options)
    commands: tuple[list[str | Path], ...] = (
        ["cmake", "-S", source, "-B", folder, *options],
        ["cmake", "--build", folder, "--parallel", str(os.cpu_count()), "--target", *targets],
    )
    with locked(folder):
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder


def kernel_tests(*targets: str) -> Path:
    """The folder of the engine's own test programs, with `targets` built.

    They share one build of the engine with what is installed: it takes longest.
    """
    options = ("-DDGEMMA_FUZZ=ON", "-DDGEMMA_INSTALL=ON", "-DCMAKE_BUILD_TYPE=Release")
    return cmake("kernel-tests", *targets, options=options)
