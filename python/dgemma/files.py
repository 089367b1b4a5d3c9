"""Writes files so that nothing is lost: under a hidden name beside the target, flushed, renamed.

The hidden name is fresh, so nothing that lies at a name somebody could foresee is followed or
overwritten. A writer holds a lock on its file for as long as it lives; what an earlier one left
behind when it was killed has none, and is removed by the next writer of the same target.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from pathlib import Path
from types import TracebackType

from .errors import FileAccessError

NAME_BYTES = 255  # the longest name that file systems take
SUFFIX = ".partial"
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_target(path: Path, *, replace: bool) -> None:
    """FileAccessError where `path` cannot become a file: its folder is missing, or it is taken.

    Only a regular file may be replaced, and only with `replace`.
    """
    if str(path) == "-":
        raise FileAccessError("-: the result cannot go to standard output; name a file")
    if not path.parent.is_dir():
        raise FileAccessError(f"{path.parent}: no such folder to write to")
    if "\0" in str(path):
        raise FileAccessError(f"{str(path)!r}: a name cannot hold a null character")
    if not path.name:
        raise FileAccessError(f"{path}: is a folder; expected the name of a file")
    if len(os.fsencode(path.name)) > NAME_BYTES:
        raise FileAccessError(f"{path}: the name is longer than {NAME_BYTES} bytes")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    for is_kind, what in _KINDS:
        if is_kind(mode):
            raise FileAccessError(f"{path}: is {what}; expected the name of a file")
    if not replace:
        raise FileAccessError(f"{path}: exists; --force replaces it")


def reason_of(error: OSError) -> str:
    """Why writing failed, in words that say what to do about a full disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the device; free some, or choose another place"
    return error.strerror or str(error)


class NewFile:
    """A file under way to `path`: `fd` is open for writing, `hidden` is its name until `commit`.

        with NewFile(path, replace=True) as file:
            os.write(file.fd, data)
            file.commit()

    Leaving without `commit` removes it. `alone`: whose turn it must not be, such as "another
    conversion": FileAccessError where the same target is being written; otherwise the last to
    commit wins. Raises FileAccessError as
    `check_target` does, and OSError.
    """

    def __init__(self, path: Path, *, replace: bool, alone: str = "") -> None:
        check_target(path, replace=replace)
        self.path = path
        self._replace = replace
        self._committed = False
        self._remove_leftovers(alone)
        self.hidden, self.fd = self._create()

    def sync(self) -> None:
        """Waits until what was written is on the disk."""
        os.fsync(self.fd)

    def rename(self) -> None:
        """Gives the file its name; what it replaces must still be what it may replace."""
        check_target(self.path, replace=self._replace)
        os.replace(self.hidden, self.path)
        self._committed = True

    def commit(self) -> None:
        """Flushes, renames, and flushes the folder's entry."""
        self.sync()
        self.rename()
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Closes the file, and removes it unless it has got its name; safe to repeat."""
        if self.fd < 0:
            return
        if not self._committed:
            with contextlib.suppress(OSError):
                os.unlink(self.hidden)
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _prefix(self) -> str:
        """How all hidden names for this target begin; long names are cut, and told by a hash."""
        name = os.fsencode(self.path.name)
        room = NAME_BYTES - len(SUFFIX) - 2 - 16
        if len(name) > room:
            digest = hashlib.sha256(name).hexdigest()[:16]
            name = name[: room - 17] + b"~" + digest.encode()
        return "." + os.fsdecode(name) + "."

    def _create(self) -> tuple[Path, int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            hidden = self.path.with_name(f"{self._prefix()}{secrets.token_hex(8)}{SUFFIX}")
            try:
                fd = os.open(hidden, flags, 0o666)
            except FileExistsError:
                continue
            if _is_locked_by_us(fd, hidden):
                return hidden, fd
            os.close(fd)  # another writer took it for a leftover before it was locked

    def _remove_leftovers(self, alone: str) -> None:
        prefix = self._prefix()
        own = re.compile(re.escape(prefix) + r"[0-9a-f]{16}" + re.escape(SUFFIX) + r"\Z")
        with os.scandir(self.path.parent) as entries:
            names = [
                entry.path
                for entry in entries
                if own.match(entry.name) and entry.is_file(follow_symlinks=False)
            ]
        for name in names:
            try:
                fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue  # gone meanwhile, or somebody else's
            try:
                if _is_locked_by_us(fd, Path(name)):
                    os.unlink(name)
                elif alone and os.path.exists(name):
                    raise FileAccessError(f"{self.path}: {alone} is writing it")
            finally:
                os.close(fd)


def _is_locked_by_us(fd: int, path: Path) -> bool:
    """Locks an open file; False where another has locked it, or it is no longer at `path`."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
    except OSError as error:
        # Otherwise it is a file system without locks: nothing is known to be in use.
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's new entries are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: str | os.PathLike[str], data: bytes | str, *, replace: bool = True) -> None:
    """Writes a whole file, or leaves what was there. Text is encoded as UTF-8.

    FileAccessError as of `check_target`; OSError where the disk is full or fails.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    with NewFile(Path(path), replace=replace) as file:
        view = memoryview(content)
        while view:
            view = view[os.write(file.fd, view) :]
        file.commit()
