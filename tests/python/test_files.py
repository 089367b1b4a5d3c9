"""The one way in which files are written: nothing is lost, followed or left behind."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dgemma.errors import FileAccessError
from dgemma.files import NewFile, check_target, write_file


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_file(path, "first")
    write_file(path, b"second")
    assert path.read_bytes() == b"second"
    with pytest.raises(FileAccessError, match=r"a\.txt: exists; --force replaces it"):
        write_file(path, "third", replace=False)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("precious")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("precious", [path])


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "link", "dangling link"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "target", tmp_path / "other"
    other.write_text("precious")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "none")
    with pytest.raises(FileAccessError, match="expected the name of a file"):
        write_file(path, "new")
    assert other.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "target"]


def test_targets_in_words(tmp_path: Path) -> None:
    for path, match in (
        (Path("-"), "-: the result cannot go to standard output; name a file"),
        (tmp_path / "none" / "a", "no such folder to write to"),
        (tmp_path / ("x" * 256), "longer than 255 bytes"),
        (Path("/"), "is a folder"),
        (Path("/dev/null"), "is a device"),
        (tmp_path / "a\0b", "null character"),
    ):
        with pytest.raises(FileAccessError, match=match):
            check_target(path, replace=True)


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "a.gguf"])
def test_hidden_names_fit_and_nothing_at_them_is_followed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with NewFile(path, replace=True) as file:
        assert file.hidden.name.startswith(".")
        assert len(os.fsencode(file.hidden.name)) <= 255
        os.write(file.fd, b"x")
        file.commit()
    assert list(tmp_path.iterdir()) == [path]
    link = tmp_path / file.hidden.name
    link.symlink_to(tmp_path / "elsewhere")  # a name that cannot be foreseen, foreseen
    write_file(path, "y")
    assert path.read_text() == "y"
    assert not (tmp_path / "elsewhere").exists()


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "a.txt", tmp_path / ".b.txt.0123456789abcdef.partial"
    other.write_text("of another target")
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dgemma.files import NewFile\n"
        "NewFile(Path(sys.argv[1]), replace=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code, str(path)])
        assert len(list(tmp_path.iterdir())) == 2
    write_file(path, "whole")
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_writers_of_one_target_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with NewFile(path, replace=True) as first:
        write_file(path, "second")
        with pytest.raises(FileAccessError, match=r"a\.txt: another save is writing it"):
            NewFile(path, replace=True, alone="another save")
        os.write(first.fd, b"first")
        first.commit()
    assert path.read_text() == "first"
    texts = [str(i) * 50_000 for i in range(8)]
    threads = [threading.Thread(target=write_file, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]
