"""What a batch has answered so far: safe from a crash after every line, resumed by the next run.

Answers are appended to `OUT.partial`, each with the number of its line, in the order in which they
come. When all are there the output is written beside its place, and renamed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from ..files import NewFile
from .records import BatchError, Record, succeeded

BEGINNING = b'{"source": '
T = TypeVar("T")


class Journal:
    """The file `OUT.partial`, open for appending.

    Its first line names the input by a digest, so that answers to one file never end up in
    another's. Errors: BatchError where it belongs to another input or to a run that still goes on.
    """

    def __init__(self, output: Path, source: Path, *, retry_failed: bool = False) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self._source, self._retry_failed = source, retry_failed
        self._places: dict[int, tuple[int, int]] = {}  # line: offset and length of its record
        self.n_failed = 0  # of the answers held
        self._file: BinaryIO

    def __enter__(self) -> Journal:
        self._file = self._opened()
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def append(self, number: int, record: Record) -> None:
        """Keeps the answer to a line; a second one for the same line is left out."""
        if number in self._places:
            return
        line = _line({"line": number, "record": record})
        self._file.seek(0, os.SEEK_END)
        place = self._file.tell()
        self._file.write(line)
        self._file.flush()
        self._places[number] = (place, len(line))
        self.n_failed += not succeeded(record)

    def finish(self, *, ordered: bool) -> None:
        """Writes the output, whole or not at all, and takes the journal away."""
        order = sorted(self._places) if ordered else list(self._places)
        with NewFile(self.output, replace=True) as file, open(file.fd, "wb", closefd=False) as out:
            for number in order:
                out.write(_line(self._record(number)))
            out.flush()
            file.commit()
        self.path.unlink()

    # ---- The file --------------------------------------------------------------------------------

    def _opened(self) -> BinaryIO:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return open(os.open(self.path, flags, 0o666), "a+b")
        except OSError as problem:
            if problem.errno != errno.ELOOP:
                raise
            raise BatchError(f"{self.path}: is a link, which is not followed: delete it") from None

    def _damaged(self, place: int) -> BatchError:
        return BatchError(
            f"{self.path}: byte {place}: no line of a batch's answers: it is damaged, or another "
            "program's: delete it to begin anew, or name another output"
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(
                f"{self.path}: another run writes to it: wait for that, or name another output"
            ) from None

    def _read(self) -> None:
        """Takes in what an earlier run has left; a last line that is cut is cut away."""
        digest = _digest(self._source)
        self._file.seek(0)
        head, end = self._file.readline(), 0
        if not head.endswith(b"\n"):
            if not head.startswith(BEGINNING[: len(head)]):
                raise self._damaged(0)
            self._file.truncate(0)
            self._file.write(_line({"source": str(self._source), "sha256": digest}))
            self._file.flush()
            return
        if _value(head, "sha256", str) is None:
            raise self._damaged(0)
        if _value(head, "sha256", str) != digest:
            raise BatchError(
                f"{self.path}: holds answers to another input or another version of it: "
                "delete it to begin anew, or name another output"
            )
        end = self._file.tell()
        while (line := self._file.readline()).endswith(b"\n"):
            place, end = end, self._file.tell()
            number, record = _value(line, "line", int), _value(line, "record", dict)
            if number is None or record is None or not _is_record(record):
                raise self._damaged(place)
            if self._retry_failed and not succeeded(record):
                continue
            self._places[number] = (place, len(line))
            self.n_failed += not succeeded(record)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _record(self, number: int) -> Record:
        place, length = self._places[number]
        self._file.seek(place)
        record: Record = json.loads(self._file.read(length))["record"]
        return record


def _value(line: bytes, name: str, kind: type[T]) -> T | None:
    """A field of a line of JSON; None where it is not there."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = entry.get(name) if isinstance(entry, dict) else None
    return found if type(found) is kind else None


def _is_record(record: Record) -> bool:
    response, error = record.get("response"), record.get("error")
    return isinstance(error, dict) or (isinstance(response, dict) and "status_code" in response)


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
