"""Model files from the Hugging Face hub, and from its cache where there is no network."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import Error, OptionValueError
from .transfer import bring

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
        self._known: Any = None

    def files(self) -> list[str]:
        """The names of its files; where the hub cannot be reached, of those that are here."""
        try:
            return list(self.sizes())
        except Error:
            found = self._cached()
            if not self._offline or not found:
                raise
            return found

    def fetch(self, name: str) -> str:
        """Path of a file, fetched where it is not there yet; what was interrupted continues."""
        try:
            if self._local is None and not self._offline and not self._is_here(name):
                bring(self._hub, self.repo_id, name, self._revision, self.folder)
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
        except Error:
            raise
        except Exception as problem:  # of the hub's library, whichever it uses for HTTP
            raise self._error(problem) from None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, as the hub says; 0 where it does not."""
        info = self._info()
        return {file.rfilename: int(file.size or 0) for file in info.siblings or []}

    def _info(self) -> Any:
        """What the hub knows of the repository, asked for once."""
        if self._known is None:
            if self._offline:
                raise Error(f"{self.repo_id}: the hub cannot be reached")
            try:
                self._known = self._hub.HfApi().model_info(
                    self.repo_id, revision=self._revision, files_metadata=True
                )
            except Exception as problem:  # of the hub's library, whichever it uses for HTTP
                self._offline = not self._is_refusal(problem)
                raise self._error(problem) from None
        return self._known

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return Path(self._local or self._cache or self._hub.constants.HF_HUB_CACHE)

    def missing_bytes(self, names: Sequence[str]) -> int:
        """Bytes of these files that are not here yet; 0 where their sizes are not known."""
        return self.total_bytes([name for name in names if not self._is_here(name)])

    def total_bytes(self, names: Sequence[str]) -> int:
        """Bytes of these files; 0 where their sizes are not known."""
        sizes = {} if self._offline else self.sizes()
        return sum(sizes.get(name, 0) for name in names)

    def _is_here(self, name: str) -> bool:
        if self._local is not None:
            return Path(self._local, name).exists()
        found = self._hub.try_to_load_from_cache(
            self.repo_id, name, cache_dir=self._cache, revision=self._revision
        )
        return isinstance(found, str)

    def commit(self) -> str:
        """The commit that its files are of: the hub's, or else the cache's."""
        try:
            return str(self._info().sha)
        except Error:
            revisions = [commit for commit, _ in self._cached_revisions()]
            if not self._offline or not revisions:
                raise
            return revisions[0]

    def _cached(self) -> list[str]:
        """Names of the files that are here."""
        if self._local is not None:
            folder = Path(self._local)
            files = folder.rglob("*") if folder.is_dir() else iter(())
            return [f.relative_to(folder).as_posix() for f in files if f.is_file()]
        return next((files for _, files in self._cached_revisions()), [])

    def _cached_revisions(self) -> list[tuple[str, list[str]]]:
        """Commit and files of what the cache holds under the revision that is meant."""
        try:
            cache = self._hub.scan_cache_dir(self._cache)
        except Exception:  # there is no cache yet
            return []
        wanted = self._revision or "main"
        return [
            (
                revision.commit_hash,
                [
                    f.file_path.relative_to(revision.snapshot_path).as_posix()
                    for f in revision.files
                ],
            )
            for repository in cache.repos
            if (repository.repo_id, repository.repo_type) == (self.repo_id, "model")
            for revision in repository.revisions
            if wanted in revision.refs or revision.commit_hash == wanted
        ]

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


def has_models(files: Sequence[str]) -> bool:
    """Whether there is a GGUF file with a model."""
    return bool(_models(files))


def has_type(files: Sequence[str], type: str) -> bool:
    """Whether one of them is of that type."""
    return bool(_of_type(_models(files), type))


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
