"""From the name of a repository to a file that can be loaded: found, downloaded, or converted."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import hub, machine
from ..errors import Error
from ..sizes import size_text
from .plugins import run_plugin

_NAME = re.compile(r"[\w.-]+/[\w.-]+\Z")
_SPARE = 2**30  # bytes of a disk that are left free
_LEAST_SHARE = 4  # of a 16-bit checkpoint: what small types take. The converter asks exactly


def split_name(name: str) -> tuple[str, str | None]:
    """Repository and type of USER/REPO[:TYPE]; ValueError where it is none."""
    repo, _, kind = name.partition(":")
    if not _NAME.match(repo):
        raise ValueError(f"{name!r} names no repository: expected USER/REPO or USER/REPO:TYPE")
    return repo, kind or None


def obtain(name: str, *, threads: int = 0) -> str:
    """Path of a GGUF file for USER/REPO[:TYPE].

    A file of the repository is downloaded into the hub's cache; what was interrupted continues. A
    repository with a checkpoint alone is converted, into dgemma's own cache. Disk and memory are
    looked at before. Errors: those of `hub.download`.
    """
    repo_id, kind = split_name(name)
    repository = hub.Repository(repo_id)
    files = repository.files()
    is_there = hub.has_type(files, kind) if kind else hub.has_models(files)
    if not is_there and "config.json" in files:
        return _converted(repository, files, kind, threads)
    names = hub.choose(repo_id, files, type=kind)
    _check_disk(repository.folder, repository.missing_bytes(names))
    paths = [repository.fetch(part) for part in names]
    _check_memory(sum(os.path.getsize(path) for path in paths))
    return paths[0]


def cache_folder() -> Path:
    """Where converted files are kept: $DGEMMA_CACHE, or dgemma's place in the user's cache."""
    if named := os.environ.get("DGEMMA_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dgemma"


def _converted(
    repository: hub.Repository, files: Sequence[str], kind: str | None, threads: int
) -> str:
    """The checkpoint of a repository as a GGUF file, made where it is not there yet."""
    folder = cache_folder() / repository.repo_id.replace("/", "--")
    target = folder / f"{repository.commit()[:12]}-{(kind or 'default').lower()}.gguf"
    if target.exists():
        return str(target)
    needed = [name for name in files if name.endswith(".safetensors")]
    if not needed:
        raise Error(f"{repository.repo_id} has neither GGUF files nor safetensors to make one of")
    missing = repository.missing_bytes(needed)
    print(
        f"dgemma: {repository.repo_id} has a checkpoint and no such GGUF file: "
        f"{size_text(missing)} to download, then it is converted",
        file=sys.stderr,
    )
    folder.mkdir(parents=True, exist_ok=True)
    least = repository.total_bytes(needed) // _LEAST_SHARE
    on_one_disk = _disk_of(folder) == _disk_of(repository.folder)
    _check_disk(repository.folder, missing + (least if on_one_disk else 0))
    _check_disk(folder, least, "DGEMMA_CACHE", "written")
    type_options = ("--outtype", kind.lower()) if kind else ()
    code = run_plugin(
        *("convert", repository.repo_id, "--remote", "--outfile", str(target)),
        *("--threads", str(threads), *type_options),
    )
    if code != 0 or not target.exists():
        raise Error(f"converting {repository.repo_id} failed")
    return str(target)


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _disk_of(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _check_disk(
    folder: Path, needed: int, variable: str = "HF_HOME", how: str = "downloaded"
) -> None:
    """Error where a disk has too little room."""
    free = shutil.disk_usage(_existing(folder)).free
    if needed and needed + _SPARE > free:
        raise Error(
            f"{size_text(needed)} are to be {how} to {folder}, where {size_text(free)} are "
            f"free: free some, or set {variable} to a place with more"
        )


def _check_memory(size: int) -> None:
    """Says so where a file is larger than memory: it runs, but reads the disk in every step."""
    available = machine.describe().available
    if size > available:
        print(
            f"dgemma: the file has {size_text(size)}, and {size_text(available)} of memory are "
            "available: unless a GPU holds the rest, every step will read the disk. "
            "`dgemma doctor` says which types fit",
            file=sys.stderr,
        )
