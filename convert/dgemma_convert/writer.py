"""Writes a GGUF file (or its shards) so that no half-written one can be taken for whole.

A file is written beside its target under a hidden name (dgemma.files), and its first four bytes
stay zero until everything else is on the disk; then it is renamed. Whenever the process dies, the
target is what it was before, and the hidden file is removed by the next run. Of shards, the first
is the last to be renamed, and without it no program opens the others.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue

from dgemma.files import NewFile, check_target, sync_folder
from dgemma.sizes import size_text

from .errors import ConvertError, failing_in_words, from_os_error
from .metadata import ARCHITECTURE, Keys
from .policy import Type, row_bytes
from .sources import Bytes, n_elements

MAGIC = b"GGUF"
_SIZE = re.compile(r"(\d+)([KMG]?)\Z")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}  # as llama.cpp's splitter counts
MAX_SHARDS = 65535  # split.no is a uint16
HUGE_PAGE = 2 << 20
"""What is written in whole, aligned pieces of this size stays so in Linux's page cache, on file
systems that can: the engine then finds the new file on huge pages, and its steps are faster."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file; `shape` is rows first."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def n_bytes(self) -> int:
        """Length of its data, without padding."""
        n_cols = self.shape[-1]
        return n_elements(self.shape[:-1]) * row_bytes(self.type, n_cols)

    @property
    def padded_bytes(self) -> int:
        """Length up to where the next tensor begins."""
        return -(-self.n_bytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def parse_size(text: str) -> int:
    """Bytes of a size such as "4G" or "500M"; ConvertError where it is not one."""
    match = _SIZE.match(text.upper())
    if not match or int(match[1]) == 0:
        raise ConvertError(f"size {text!r}: expected a number with K, M or G behind it, such as 4G")
    return int(match[1]) * _UNITS[match[2]]


def split(tensors: Sequence[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Tensors of each shard, in order; 0: one shard. A tensor larger than `max_bytes` is alone."""
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for tensor in tensors:
        if max_bytes and shards[-1] and used + tensor.padded_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.padded_bytes
    return shards


def shard_paths(outfile: Path, n_shards: int) -> list[Path]:
    """`outfile` itself, or the names that every GGUF program expects of shards."""
    if n_shards == 1:
        return [outfile]
    stem = outfile.name.removesuffix(".gguf")
    return [
        outfile.with_name(f"{stem}-{i + 1:05d}-of-{n_shards:05d}.gguf") for i in range(n_shards)
    ]


@dataclass
class _Shard:
    """One file under way."""

    path: Path
    tensors: list[TensorInfo]
    file: NewFile | None = None
    n_header: int = 0
    ends: dict[str, int] = field(default_factory=dict)  # where each tensor's data must end
    pending: bytearray = field(default_factory=bytearray)  # the piece under way, less than a page
    pending_at: int = 0

    @property
    def opened(self) -> NewFile:
        """The file under way."""
        assert self.file is not None, "the writer is entered before it is used"
        return self.file

    @property
    def data_bytes(self) -> int:
        return sum(tensor.padded_bytes for tensor in self.tensors)


class Writer:
    """Creates `outfile`, or its shards, with `keys` and room for `tensors`.

        with Writer(outfile, keys, tensors) as writer:
            writer.write("token_embd.weight", data)  # any tensor, any number of pieces in order
            writer.commit()

    Leaving without `commit` removes what was written. ConvertError where the target exists (without
    `force`), cannot be written, or does not fit on the disk.
    """

    def __init__(
        self,
        outfile: Path,
        keys: Mapping[str, GGUFValue],
        tensors: Sequence[TensorInfo],
        *,
        force: bool = False,
        split_max_size: int = 0,
    ) -> None:
        groups = split(tensors, split_max_size)
        if len(groups) > MAX_SHARDS:
            raise ConvertError(f"{len(groups)} shards; at most {MAX_SHARDS} can be numbered")
        self._shards = [
            _Shard(path, group)
            for path, group in zip(shard_paths(outfile, len(groups)), groups, strict=True)
        ]
        self._keys = dict(keys)
        self._force = force
        self._places: dict[str, tuple[_Shard, int]] = {}

    @property
    def paths(self) -> list[Path]:
        """The files that `commit` makes."""
        return [shard.path for shard in self._shards]

    def __enter__(self) -> Writer:
        try:
            with failing_in_words("writing"):
                for shard in self._shards:
                    check_target(shard.path, replace=self._force)
                self._check_space()
                for shard in self._shards:
                    shard.file = NewFile(
                        shard.path, replace=self._force, alone="another conversion"
                    )
                    self._write_header(shard)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abandon()

    def write(self, name: str, data: Bytes) -> None:
        """Appends to the data of one tensor."""
        shard, position = self._places[name]
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if position + len(view) > shard.ends[name]:
            raise ValueError(f"more data than tensor {name} has room for")
        self._append(shard, view, position)
        self._places[name] = shard, position + len(view)

    def commit(self, check: Callable[[Path], object] = lambda path: None) -> None:
        """Makes the files whole and gives them their names, the first shard last.

        `check` sees the whole file, or the first of its shards, under another name, and may raise.
        """
        for name, (shard, position) in self._places.items():
            if position != shard.ends[name]:
                raise ValueError(f"tensor {name} is incomplete")
        with failing_in_words("writing"):
            for shard in self._shards:
                self._flush(shard)
                shard.opened.sync()
                self._pwrite(shard, memoryview(MAGIC), 0)
                shard.opened.sync()
        self._show(check)
        with failing_in_words("writing"):
            if len(self._shards) > 1:
                # Names cannot change all at once: without a first shard, old and new ones that a
                # kill leaves side by side are no model.
                self._shards[0].path.unlink(missing_ok=True)
            for shard in reversed(self._shards):
                shard.opened.rename()
            sync_folder(self._shards[0].path.parent)

    def _show(self, check: Callable[[Path], object]) -> None:
        """Shards are found by their names, so they are shown in a folder of links."""
        if len(self._shards) == 1:
            check(self._shards[0].opened.hidden)
            return
        with tempfile.TemporaryDirectory() as folder:
            links = [Path(folder) / shard.path.name for shard in self._shards]
            for link, shard in zip(links, self._shards, strict=True):
                link.symlink_to(shard.opened.hidden.resolve())
            check(links[0])

    def _check_space(self) -> None:
        """Whether the target's own file system has room for all of it."""
        folder = self._shards[0].path.parent
        needed = sum(shard.data_bytes for shard in self._shards)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ConvertError(
                f"{folder}: no space left on the device: the file needs "
                f"{size_text(needed)}, {size_text(free)} are free"
            )

    def _write_header(self, shard: _Shard) -> None:
        """Keys and tensor table by the gguf package, then the magic taken out again."""
        keys: Keys = dict(self._keys)
        if len(self._shards) > 1:
            i = self._shards.index(shard)
            n_tensors = sum(len(s.tensors) for s in self._shards)
            if i > 0:
                keys = {k: v for k, v in keys.items() if k == "general.architecture"}
            keys["split.no"] = GGUFValue(i, GGUFValueType.UINT16)
            keys["split.count"] = GGUFValue(len(self._shards), GGUFValueType.UINT16)
            keys["split.tensors.count"] = GGUFValue(n_tensors, GGUFValueType.INT32)
        header = GGUFWriter(None, ARCHITECTURE)
        header.kv_data = [keys]
        for tensor in shard.tensors:
            # The data type is only looked at where raw_dtype is not given.
            header.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                tensor.n_bytes,
                raw_dtype=tensor.type,
            )
        header.write_header_to_file(shard.opened.hidden)
        self._pwrite(shard, memoryview(bytes(len(MAGIC))), 0)
        try:
            header.write_kv_data_to_file()
            header.write_ti_data_to_file()
        finally:
            header.close()
        n_header = os.fstat(shard.opened.fd).st_size
        shard.n_header = -(-n_header // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT
        position = shard.n_header
        for tensor in shard.tensors:
            self._places[tensor.name] = shard, position
            shard.ends[tensor.name] = position + tensor.n_bytes
            position += tensor.padded_bytes
        # Its full size from the first: a file system that cannot hold it says so now.
        os.ftruncate(shard.opened.fd, shard.n_header + shard.data_bytes)

    def _append(self, shard: _Shard, view: memoryview, position: int) -> None:
        """Writes what makes whole pages, and keeps the rest until more comes."""
        gap = position - (shard.pending_at + len(shard.pending))
        if 0 <= gap < GGUF_DEFAULT_ALIGNMENT:
            shard.pending += bytes(gap)  # the padding between two tensors
        else:
            self._flush(shard)
            shard.pending_at = position
        while view:
            end = shard.pending_at + len(shard.pending)
            n = HUGE_PAGE - end % HUGE_PAGE
            if n == HUGE_PAGE and not shard.pending and len(view) >= n:
                n = len(view) // HUGE_PAGE * HUGE_PAGE
                self._pwrite(shard, view[:n], end)
                shard.pending_at = end + n
            else:
                shard.pending += view[:n]
                if len(view) >= n:
                    self._flush(shard)
            view = view[n:]

    def _flush(self, shard: _Shard) -> None:
        self._pwrite(shard, memoryview(shard.pending), shard.pending_at)
        shard.pending_at += len(shard.pending)
        shard.pending = bytearray()

    def _pwrite(self, shard: _Shard, view: memoryview, position: int) -> None:
        try:
            while view:
                n = os.pwrite(shard.opened.fd, view, position)
                view, position = view[n:], position + n
        except OSError as error:
            error.filename = str(shard.path)
            raise from_os_error(error, "writing") from error

    def _abandon(self) -> None:
        """Closes all files and removes those that were not committed."""
        for shard in self._shards:
            if shard.file is not None:
                shard.file.close()
