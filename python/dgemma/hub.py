"""Model files from the Hugging Face hub, and progress bars."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from typing import Any

from tqdm import tqdm

from .errors import Error
from .values import Progress

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf\Z")


def download(
    repo_id: str,
    pattern: str,
    local_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Path of a repository's file, fetched where it is not there yet; its first shard, if several.

    ImportError without the extra `hub`; ValueError where no file fits the pattern.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("downloading needs the extra `hub`: pip install 'dgemma[hub]'") from None
    folder = None if local_dir is None else os.fspath(local_dir)
    cache = None if cache_dir is None else os.fspath(cache_dir)
    try:
        files = huggingface_hub.list_repo_files(repo_id)
        names = matching(files, pattern)
        if not names:
            available = ", ".join(f for f in files if f.endswith(".gguf")) or "none"
            raise ValueError(f"{repo_id} has no file {pattern!r}; its GGUF files: {available}")
        paths = [
            huggingface_hub.hf_hub_download(repo_id, name, local_dir=folder, cache_dir=cache)
            for name in names
        ]
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as problem:
        first_line = str(problem).strip().split("\n")[0]
        raise Error(f"cannot download from {repo_id}: {first_line}") from problem
    return str(paths[0])


def matching(files: list[str], pattern: str) -> list[str]:
    """The file that a pattern means, with all of its shards; of several files, the first."""
    found = sorted(name for name in files if name.endswith(".gguf") and _fits(name, pattern))
    if not found:
        return []
    shard = _SHARD.match(found[0])
    if shard is None:
        return found[:1]
    siblings = (_SHARD.match(name) for name in sorted(files))
    return [m[0] for m in siblings if m is not None and m.groups() == shard.groups()]


def _fits(name: str, pattern: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatch(n.lower(), pattern.lower()) for n in (name, base))


def progress_bar(what: str) -> Progress:
    """A bar on standard error, shown only on a terminal."""
    bar: Any = tqdm(desc=what, total=100, unit="%", leave=False, disable=not sys.stderr.isatty())

    def update(done: float) -> None:
        bar.update(int(100 * done) - bar.n)
        if done >= 1:
            bar.close()

    return update
