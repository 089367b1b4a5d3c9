"""Session files: written as a whole or not at all, and refused where they are damaged."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from pathlib import Path

import pytest

import dgemma
from dgemma import FileAccessError, ModelFileError
from support import small_model
from support.engine import open_model

PROMPT = list(range(3, 40))
HEADER = struct.Struct("<8siiiiiiQQ")  # native/engine/session_file.c


def checksum(data: bytes) -> int:
    """FNV-1a, as the file has it: over the header's fields and everything behind it."""
    state = 0xCBF29CE484222325
    for byte in data[: HEADER.size - 8] + data[HEADER.size :]:
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return state


def with_checksum(data: bytes) -> bytes:
    return data[: HEADER.size - 8] + struct.pack("<Q", checksum(data)) + data[HEADER.size :]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is made without PyTorch, so that these tests run under sanitizers too."""
    return small_model.write(tmp_path_factory.mktemp("session-files") / "small.gguf")


@pytest.fixture(scope="module")
def llm(small: Path) -> dgemma.DiffusionGemma:
    return open_model(small)


def hidden(path: Path, digits: str = "0123456789abcdef") -> Path:
    return path.with_name(f".{path.name}.{digits}.tmp")


# ---- Writing -------------------------------------------------------------------------------------


def test_threads_that_save_to_one_path_leave_one_whole_file(
    llm: dgemma.DiffusionGemma, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    sessions = [llm.session() for _ in range(3)]
    for i, session in enumerate(sessions):
        session.prefill(PROMPT[: 10 + i])
    problems: list[BaseException] = []

    def save(i: int) -> None:
        try:
            for _ in range(30):
                sessions[i].save(path)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    with llm.session() as reader:
        while any(thread.is_alive() for thread in threads):
            if path.exists():
                reader.load(path)
                assert reader.n_past in (10, 11, 12)
    for thread in threads:
        thread.join()
    assert not problems
    assert [entry.name for entry in tmp_path.iterdir()] == ["session"]
    for session in sessions:
        session.close()


def test_leftovers_of_killed_writers_are_removed_and_no_others(
    llm: dgemma.DiffusionGemma, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    stale, busy = hidden(path), hidden(path, "f" * 16)
    others = [
        hidden(tmp_path / "sessions"),
        tmp_path / ".session.0123456789abcdeX.tmp",
        tmp_path / ".session.0123.tmp",
        tmp_path / "session.0123456789abcdef.tmp",
    ]
    for file in (stale, busy, *others):
        file.write_bytes(b"half")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    link = hidden(path, "a" * 16)
    link.symlink_to(elsewhere)
    with open(busy, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with llm.session() as session:
            session.prefill(PROMPT)
            session.save(path)
    assert not stale.exists()
    assert busy.exists()
    assert all(file.exists() for file in others)
    assert link.is_symlink()
    assert elsewhere.read_bytes() == b"mine"


def test_a_killed_writer_leaves_the_older_file_and_nothing_for_long(
    small: Path, tmp_path: Path
) -> None:
    """A child is killed in the middle of saving, by a signal from a thread of its own."""
    path = tmp_path / "session"
    with open_model(small) as model, model.session() as session:
        session.prefill(PROMPT)
        session.save(path)
        older = path.read_bytes()
        for delay in (0.0, 0.0005, 0.001, 0.002, 0.004):
            child = os.fork()
            if child == 0:
                # Stands where a writer is killed: its file is there, locked and not whole.
                half = hidden(path, f"{int(delay * 1e4):016x}")
                with open(half, "wb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    file.write(b"half")
                    file.flush()
                    os.kill(os.getpid(), 9)
            os.waitpid(child, 0)
            assert path.read_bytes() == older
        assert len(list(tmp_path.iterdir())) == 6
        session.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["session"]


@pytest.mark.parametrize("name", ["s" * 255, "é" * 127, "x"])
def test_names_of_any_length(name: str, llm: dgemma.DiffusionGemma, tmp_path: Path) -> None:
    with llm.session() as session:
        session.prefill(PROMPT)
        session.save(tmp_path / name)
        session.load(tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_only_files_are_written_over(llm: dgemma.DiffusionGemma, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with llm.session() as session:
        session.prefill(PROMPT)
        with pytest.raises(FileAccessError, match="a device or pipe, which is not written over"):
            session.save(fifo)
        with pytest.raises(FileAccessError, match="a folder, which is not written over"):
            session.save(tmp_path)
        with pytest.raises(FileAccessError, match="not the name of a file"):
            session.save(f"{tmp_path}/")
        with pytest.raises(FileAccessError, match="cannot write: No such file or directory"):
            session.save(tmp_path / "none" / "session")
    assert fifo.is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


# ---- Reading -------------------------------------------------------------------------------------

NOT_FINITE = {
    "f32": [struct.pack("<f", float("nan")), struct.pack("<f", float("-inf"))],
    "f16": [b"\x00\x7c", b"\x01\xfe"],
    "bf16": [b"\x80\x7f", b"\xc0\xff"],
    "q8_0": [b"\x00\x7c", b"\x01\xfe"],
}


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_a_cache_with_numbers_that_are_not_finite_is_refused(
    kind: str, small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    with open_model(small, type_k=kind, type_v=kind) as model:
        with model.session() as session:
            session.prefill(PROMPT)
            session.save(path)
        whole = path.read_bytes()
        assert with_checksum(whole) == whole
        first = HEADER.size + 4 * len(PROMPT)
        with model.session() as session:
            session.prefill(PROMPT[:5])
            for bits in NOT_FINITE[kind]:
                data = bytearray(whole)
                data[first : first + len(bits)] = bits
                path.write_bytes(with_checksum(bytes(data)))
                with pytest.raises(ModelFileError, match="of position 0 are not finite"):
                    session.load(path)
                assert session.n_past == 5
            path.write_bytes(whole)
            session.load(path)
            assert session.n_past == len(PROMPT)


def test_damage_is_refused_before_the_session_is_touched(
    llm: dgemma.DiffusionGemma, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    with llm.session() as session:
        session.prefill(PROMPT)
        session.save(path)
        whole = path.read_bytes()
        session.truncate(4)
        token = bytearray(whole)
        token[HEADER.size : HEADER.size + 4] = struct.pack("<i", 1 << 20)
        for data, expected in [
            (whole[:-1], "ends too early"),
            (whole + b"\0", "longer than its cache"),
            (whole[:-1] + bytes([whole[-1] ^ 1]), "checksum does not fit"),
            (with_checksum(bytes(token)), "token 1048576 is outside the vocabulary"),
        ]:
            path.write_bytes(data)
            with pytest.raises(ModelFileError, match=expected):
                session.load(path)
            assert session.n_past == 4


def test_more_threads_than_the_limit_are_refused_before_any_starts(
    llm: dgemma.DiffusionGemma,
) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    for n in (1025, 2**31 - 1):
        with pytest.raises(ValueError, match=f"n_threads is {n}"):
            llm.session(n_threads=n)
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == before
