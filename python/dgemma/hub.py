"""Model files from the Hugging Face hub, and from its cache where there is no network."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import Error, OptionValueError

PREFERRED_TYPE = "Q4_K_M"  # of several files, where nobody names one: llama.cpp's choice
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf\Z")
_OTHER = re.compile(r"(^|[-_./])(mmproj|imatrix)([-_.]|$)", re.IGNORECASE)  # no models

PathLike = str | os.PathLike[str]


def download(
    repo_id: str,
    pattern: str | None = None,
    *,
    type: str | None = None,
    local_dir: PathLike | None = None,
    cache_dir: PathLike | None = None,
    revision: str | None = None,
    additional_files: Sequence[str] = (),
) -> str:
    """Path of a repository's GGUF file, fetched where it is not there yet; its first shard.

    The file is the one that fits `pattern`, or whose name holds the `type`, such as "Q4_K_M".
    What was interrupted continues. Without a network the cache alone is used.

    ImportError without the extra `hub`; ValueError where no file is meant, or several are; Error,
    of one line, where the hub cannot be reached.
    """
    repository = Repository(repo_id, local_dir=local_dir, cache_dir=cache_dir, revision=revision)
    files = repository.files()
    names = choose(repo_id, files, pattern, type)
    for wanted in additional_files:
        fitting = sorted(name for name in files if _fits(name, wanted))
        if not fitting:
            raise OptionValueError(f"{repo_id} has no file {wanted!r}", param="additional_files")
        names += fitting
    paths = [repository.fetch(name) for name in names]
    return paths[0]


class Repository:
    """A repository of the hub, or what the cache holds of it."""

    def __init__(
        self,
        repo_id: str,
        *,
        local_dir: PathLike | None = None,
        cache_dir: PathLike | None = None,
        revision: str | None = None,
    ) -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise ImportError(
                "downloading needs the extra `hub`: pip install 'dgemma[hub]'"
            ) from None
        self._hub: Any = huggingface_hub
        self.repo_id, self._revision = repo_id, revision
        self._local = None if local_dir is None else os.fspath(local_dir)
        self._cache = None if cache_dir is None else os.fspath(cache_dir)
        self._offline = False

    def files(self) -> list[str]:
        """The names of its files; where the hub cannot be reached, of those that are here."""
        try:
            return list(self._hub.list_repo_files(self.repo_id, revision=self._revision))
        except self._problems() as problem:
            if self._is_refusal(problem):
                raise self._error(problem) from None
            found = self._cached()
            if not found:
                raise self._error(problem) from None
            self._offline = True
            return found

    def fetch(self, name: str) -> str:
        """Path of a file, fetched where it is not there yet."""
        try:
            return str(
                self._hub.hf_hub_download(
                    self.repo_id,
                    name,
                    local_dir=self._local,
                    cache_dir=self._cache,
                    revision=self._revision,
                    local_files_only=self._offline,
                )
            )
        except self._problems() as problem:
            raise self._error(problem) from None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file; empty where the hub cannot be reached."""
        if self._offline:
            return {}
        try:
            info = self._hub.HfApi().model_info(
                self.repo_id, revision=self._revision, files_metadata=True
            )
        except self._problems():
            return {}
        return {file.rfilename: int(file.size or 0) for file in info.siblings or []}

    def _cached(self) -> list[str]:
        """Names of the files that are here."""
        if self._local is not None:
            folder = Path(self._local)
            files = folder.rglob("*") if folder.is_dir() else iter(())
            return [f.relative_to(folder).as_posix() for f in files if f.is_file()]
        try:
            cache = self._hub.scan_cache_dir(self._cache)
        except (OSError, ValueError):
            return []
        for repository in cache.repos:
            if (repository.repo_id, repository.repo_type) != (self.repo_id, "model"):
                continue
            wanted = self._revision or "main"
            for revision in repository.revisions:
                if wanted in revision.refs or revision.commit_hash == wanted:
                    return [
                        file.file_path.relative_to(revision.snapshot_path).as_posix()
                        for file in revision.files
                    ]
        return []

    def _problems(self) -> tuple[type[Exception], ...]:
        errors = self._hub.errors
        found: list[type[Exception]] = [OSError, ValueError, errors.HfHubHTTPError]
        try:
            import httpx

            found.append(httpx.HTTPError)
        except ImportError:  # releases before 1.0 use requests, whose errors are OSErrors
            pass
        return tuple(found)

    def _is_refusal(self, problem: Exception) -> bool:
        """Whether the hub has answered, and its answer is no."""
        if isinstance(problem, ValueError) and not isinstance(problem, OSError):
            return True  # no name of a repository
        response = getattr(problem, "response", None)
        status = getattr(response, "status_code", None)
        return status is not None and status < 500

    def _error(self, problem: Exception) -> Error:
        errors, lines = self._hub.errors, str(problem).strip().splitlines()
        reason = " ".join((lines[0] if lines else type(problem).__name__).split())
        if isinstance(problem, errors.GatedRepoError):
            reason = "access must be asked for on its page, and `hf auth login` called"
        elif isinstance(problem, errors.RepositoryNotFoundError):
            reason = "there is no such repository, or it is private (then call `hf auth login`)"
        elif isinstance(problem, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set, and it is not in the cache"
        elif not self._is_refusal(problem):
            reason = f"the hub cannot be reached, and it is not in the cache ({reason})"
        return Error(f"cannot download from {self.repo_id}: {reason}")


def choose(
    repo_id: str, files: Sequence[str], pattern: str | None = None, type: str | None = None
) -> list[str]:
    """The names of the one file that is meant, with all of its shards; ValueError otherwise."""
    models = _models(files)
    if type is not None:
        what, found = f"of type {type}", _of_type(models, type)
    elif pattern is not None and pattern != "*.gguf":
        what = f"{pattern!r}"
        found = [name for name in _models(files, also_others=True) if _fits(name, pattern)]
    else:
        what = "in GGUF"
        found = models if len(models) == 1 else _of_type(models, PREFERRED_TYPE) or models
    if not found:
        there = ", ".join(models) or "none"
        raise OptionValueError(f"{repo_id} has no file {what}; its GGUF files: {there}")
    if len(found) > 1:
        raise OptionValueError(
            f"{repo_id} has several files {what}: name one of {', '.join(found)}"
        )
    shard = _SHARD.match(found[0])
    if shard is None:
        return found
    siblings = (_SHARD.match(name) for name in sorted(files))
    return [m[0] for m in siblings if m is not None and m.groups() == shard.groups()]


def _models(files: Sequence[str], *, also_others: bool = False) -> list[str]:
    """The GGUF files with models; of one in shards, the first."""
    found = []
    for name in sorted(files):
        shard = _SHARD.match(name)
        is_first = shard is None or "-00001-of-" in name
        if name.lower().endswith(".gguf") and is_first and (also_others or not _OTHER.search(name)):
            found.append(name)
    return found


def _of_type(names: Sequence[str], type: str) -> list[str]:
    """Those whose name holds the type as a word, or else anywhere."""
    word = re.compile(rf"(^|[-_./]){re.escape(type)}([-_./]|$)", re.IGNORECASE)
    exact = re.compile(rf"(^|[-./]){re.escape(type)}([-./]|$)", re.IGNORECASE)
    return (
        [name for name in names if exact.search(name)]
        or [name for name in names if word.search(name)]
        or [name for name in names if type.lower() in name.lower()]
    )


def _fits(name: str, pattern: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatch(n.lower(), pattern.lower()) for n in (name, base))
