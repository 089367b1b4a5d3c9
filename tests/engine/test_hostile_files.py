"""Files that are damaged, or made to do damage: one clear line, in bounded time and memory.

The numbers of the sections are the rows of the table "Damaged files" in docs/format.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import support.gguf_builder as b
from dgemma import errors
from dgemma._native import File
from support.gguf_builder import (
    SOME_DATA,
    SOME_KEYS,
    SOME_TENSORS,
    array,
    gguf,
    key,
    string,
    tensor,
    u32,
    u64,
)

MEMORY_ALLOWED = 64 << 20
"""Address space that opening a file of a few kilobytes may take beyond what is in use."""


def open_with_little_memory(path: Path) -> None:
    """Opens `path` with the address space limited: a large allocation would raise another error."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_ALLOWED, hard))
    try:
        File(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Checks that content is refused with a text that matches `expected`, and returns the text."""

    def check(content: bytes, expected: str) -> str:
        path = tmp_path / "hostile.gguf"
        path.write_bytes(content)
        opened = open_with_little_memory if sys.platform == "linux" else File
        with pytest.raises(errors.ModelFileError, match=expected) as raised:
            opened(path)
        text = str(raised.value)
        assert text.startswith(f"{path}: "), "the message begins with the file"
        assert "\n" not in text
        assert re.search(r": [^:]*(fetch|convert|use|make|put|give|open)", text), "… and advises"
        return text

    return check


Refused = Callable[[bytes, str], str]


# ---- 1. Not such a file at all


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"GG", "byte 0: 4 bytes should follow, but the file ends after 2"),
        (b"GGUF", "byte 4: 4 bytes should follow"),
        (gguf(magic=b"GGML"), "not a GGUF file: it begins with 47 47 4d 4c"),
        (b"\x93NUMPY" + bytes(100), "not a GGUF file: it begins with 93 4e 55 4d"),
        (gguf(version=0), "byte 4: GGUF version 0, expected 2 or 3"),
        (gguf(version=1), "GGUF version 1"),
        (gguf(version=4), "GGUF version 4"),
        (gguf(version=2**31), "big-endian|version 2147483648"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte 4: a big-endian file"),
    ],
)
def test_not_a_gguf_file(refused: Refused, content: bytes, expected: str) -> None:
    refused(content, expected)


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        errors.ModelFileError, match=r"a folder, expected a GGUF file.*dgemma convert"
    ):
        File(tmp_path)


def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(errors.ModelFileError, match="not a regular file"):
        File(tmp_path / "pipe.gguf")


def test_device_is_refused() -> None:
    with pytest.raises(errors.ModelFileError, match="not a regular file"):
        File("/dev/zero")


@pytest.mark.parametrize("name", ["nothing.gguf", "no/such/folder/model.gguf", "x" * 300, ""])
def test_missing_file_is_an_access_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.FileAccessError, match="cannot be opened"):
        File(f"{tmp_path}/{name}" if name else "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_an_access_error(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(b.valid())
    path.chmod(0)
    with pytest.raises(errors.FileAccessError, match="cannot be opened"):
        File(path)


# ---- 2. Counts


@pytest.mark.parametrize("n", [2, 2**20 + 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1])
def test_count_of_tensors_beyond_the_file(refused: Refused, n: int) -> None:
    refused(gguf(n_tensors=n), f"byte 8: {n} tensors cannot stand in")


@pytest.mark.parametrize("n", [3, 2**20 + 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1])
def test_count_of_keys_beyond_the_file(refused: Refused, n: int) -> None:
    refused(gguf(n_keys=n), f"byte 16: {n} keys cannot stand in")


def test_counts_beyond_any_model(refused: Refused) -> None:
    n = 2**20 + 1
    refused(gguf(n_keys=n) + bytes(14 * n), f"and {n} keys, expected at most")


def test_counts_that_fit_but_are_wrong(refused: Refused) -> None:
    refused(gguf(SOME_KEYS, n_keys=5) + bytes(64), r"key 4, byte \d+: a name of 0 bytes")
    refused(gguf(SOME_KEYS, SOME_TENSORS, SOME_DATA, n_tensors=3), r"tensor 2, byte \d+:")


# ---- 3. Keys


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (key("", b.UINT8, 1), "key 0, byte 24: a name of 0 bytes, expected 1 to 65535"),
        (key("k" * 65536, b.UINT8, 1), "a name of 65536 bytes, expected 1 to 65535"),
        (key(b"\xff\xfe", b.UINT8, 1), "key 0, byte 24: a string is not valid UTF-8"),
        (key("a\0b", b.UINT8, 1), "a zero byte in a name"),
        (key("a", b.UINT8, 1) + key("b", b.UINT8, 1) + key("a", b.UINT8, 2), 'key "a", .* twice'),
        (string("a") + u32(13) + bytes(8), 'key "a", byte 33: unknown value type 13'),
        (string("a") + u32(2**32 - 1) + bytes(8), "unknown value type 4294967295"),
        (key("a", b.BOOL, 2), 'key "a", byte 37: a bool of value 2, expected 0 or 1'),
        (array("a", b.BOOL, [0, 1, 255]), r'key "a", byte 51: a bool of value 255'),
        (key("a", b.STRING, b"\xc3"), "not valid UTF-8"),
    ],
)
def test_bad_key(refused: Refused, bad: bytes, expected: str) -> None:
    n_keys = 3 if "twice" in expected else 1
    refused(gguf([bad], n_keys=n_keys) + bytes(64), expected)


@pytest.mark.parametrize(
    "text",
    [
        b"\x80",  # a continuation without a lead
        b"\xc0\xaf",  # longer than needed
        b"\xe0\x80\xaf",
        b"\xf0\x80\x80\xaf",
        b"\xed\xa0\x80",  # a surrogate
        b"\xf4\x90\x80\x80",  # above U+10FFFF
        b"\xf8\x88\x80\x80\x80",
        b"\xe2\x82",  # cut short
        b"ok \xe2\x82 ok",
    ],
)
def test_invalid_utf8_is_refused_everywhere(refused: Refused, text: bytes) -> None:
    refused(gguf([key("a", b.STRING, text)]), 'key "a", .* not valid UTF-8')
    refused(gguf([array("a", b.STRING, ["fine", text])]), 'key "a", .* not valid UTF-8')
    refused(gguf([], [tensor(text, [4])], bytes(32)), "tensor 0, .* not valid UTF-8")


# ---- 4. Strings and arrays


@pytest.mark.parametrize("length", [2**20, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64 - 8])
def test_string_longer_than_the_file(refused: Refused, length: int) -> None:
    text = string("a") + u32(b.STRING) + string("short", length)
    refused(gguf([text]), f'key "a", byte 37: a string of {length} bytes, but only')
    name = string("short", length) + u32(b.UINT8) + b"\1"
    refused(gguf([name]), f"key 0, byte 24: a string of {length} bytes, but only")


@pytest.mark.parametrize("n", [2**20, 2**30, 2**32, 2**61, 2**62, 2**63 - 1])
@pytest.mark.parametrize("type", [b.UINT8, b.UINT32, b.FLOAT64, b.STRING, b.BOOL])
def test_array_longer_than_the_file(refused: Refused, type: int, n: int) -> None:
    content = ["x"] if type == b.STRING else [1]
    refused(gguf([array("a", type, content, n)]), f'key "a", byte 49: {n} values of at least')


@pytest.mark.parametrize("n", [2**63, 2**64 - 1])
def test_array_of_negative_length(refused: Refused, n: int) -> None:
    refused(gguf([array("a", b.UINT8, [1], n)]), f"an array of {n} values")


def test_array_of_arrays(refused: Refused) -> None:
    nested = string("a") + u32(b.ARRAY) + u32(b.ARRAY) + u64(1) + u32(b.UINT8) + u64(1) + b"\1"
    refused(gguf([nested]), 'key "a", byte 37: an array of arrays')
    deep = string("a") + u32(b.ARRAY) + (u32(b.ARRAY) + u64(1)) * 100_000
    refused(gguf([deep]), "an array of arrays")


def test_array_of_unknown_type(refused: Refused) -> None:
    refused(gguf([string("a") + u32(b.ARRAY) + u32(77) + u64(0)]), "unknown value type 77")


# ---- 5. Alignment


@pytest.mark.parametrize("alignment", [0, 1, 4, 3, 12, 33, 2**22, 2**31, 2**32 - 1])
def test_alignment_out_of_range(refused: Refused, alignment: int) -> None:
    keys = [key("general.alignment", b.UINT32, alignment)]
    refused(
        gguf(keys, SOME_TENSORS, SOME_DATA), f'"general.alignment" is {alignment}, expected a power'
    )


@pytest.mark.parametrize("type", [b.UINT8, b.UINT16, b.INT32, b.UINT64, b.FLOAT32, b.STRING])
def test_alignment_of_another_type(refused: Refused, type: int) -> None:
    keys = [key("general.alignment", type, "32" if type == b.STRING else 32)]
    refused(
        gguf(keys, SOME_TENSORS, SOME_DATA),
        r'"general.alignment" has value type \d+, expected uint32',
    )


# ---- 6. Names, shapes and types of tensors


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (tensor("", [4]), "a name of 0 bytes, expected 1 to 64"),
        (tensor("n" * 65, [4]), "a name of 65 bytes, expected 1 to 64"),
        (tensor("a\0b", [4]), "a zero byte in a name"),
        (tensor("t", [1] * 5), 'tensor "t", .*: 5 dimensions, expected at most 4'),
        (tensor("t", [1], n_dims=2**32 - 1), "4294967295 dimensions"),
        (tensor("t", [0]), 'tensor "t", .*: dimension 0 is 0, expected at least 1'),
        (tensor("t", [4, 0]), "dimension 1 is 0"),
        (tensor("t", [-1]), "dimension 0 is -1"),
        (tensor("t", [4, 2**63]), "dimension 1 is -9223372036854775808"),
        (tensor("t", [2**32, 2**32]), r"more than 2\^63 elements"),
        (tensor("t", [2**16] * 4), r"more than 2\^63 elements"),
        (tensor("t", [3, 2**62]), r"more than 2\^63 elements"),
        (tensor("t", [2**62]), r"more than 2\^63 bytes"),
        (tensor("t", [2**61]), r"more than 2\^63 bytes"),
        (tensor("t", [2**61 - 1]), "goes past the end"),
        (tensor("t", [32, 2**57], b.Q8_0), "goes past the end|more than"),
        (
            tensor("t", [31], b.Q4_0),
            "rows of 31 elements, expected a multiple of 32, the block of type q4_0",
        ),
        (tensor("t", [16, 2], b.Q8_0), "rows of 16 elements, expected a multiple of 32"),
        (tensor("t", [], b.Q8_0), "rows of 1 elements, expected a multiple of 32"),
        (tensor("t", [4], 4), "type 4 is not one that this engine reads"),
        (tensor("t", [4], 1000), "type 1000 is not one that this engine reads"),
        (tensor("t", [4], 2**32 - 1), "type 4294967295 is not one that this engine reads"),
        (tensor("t", [4], 2**31), "type 2147483648 is not one that this engine reads"),
    ],
)
def test_bad_tensor(refused: Refused, bad: bytes, expected: str) -> None:
    refused(gguf([], [bad], bytes(4096)), expected)


def test_tensor_twice(refused: Refused) -> None:
    twice = [tensor("t", [4]), tensor("t", [4], offset=32)]
    refused(gguf([], twice, bytes(64)), 'tensor "t" is there twice')


# ---- 7. Where the data lies


@pytest.mark.parametrize(
    ("tensors", "n_bytes", "expected"),
    [
        ([tensor("t", [4], offset=1)], 64, "offset 1, expected a multiple of 32"),
        ([tensor("t", [4], offset=8)], 64, "offset 8, expected a multiple of 32"),
        ([tensor("t", [4], offset=64)], 64, "16 bytes at offset 64, goes past the end"),
        ([tensor("t", [17], offset=0)], 64, "68 bytes at offset 0, goes past the end"),
        ([tensor("t", [4], offset=2**64 - 32)], 64, "goes past the end"),
        ([tensor("t", [4], offset=2**63)], 64, "goes past the end"),
        ([tensor("t", [4])], 0, "goes past the end|data is missing"),
        ([tensor("a", [4]), tensor("b", [4])], 64, 'tensor "b".* overlaps that of tensor "a"'),
        ([tensor("a", [9]), tensor("b", [4], offset=32)], 64, 'tensor "b".* overlaps'),
        ([tensor("b", [4], offset=32), tensor("a", [9])], 64, 'tensor "b".* overlaps'),
    ],
)
def test_bad_offset(refused: Refused, tensors: list[bytes], n_bytes: int, expected: str) -> None:
    refused(gguf([], tensors, bytes(n_bytes)), expected)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = b.valid()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    File(path).close()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(errors.ModelFileError, match="fetch it again"):
            File(path)


def test_long_sparse_file_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    claim = gguf([string("a") + u32(b.STRING) + string("", 2**39)])
    with path.open("wb") as file:
        file.write(claim)
        file.truncate(2**40)
    with pytest.raises(errors.ModelFileError, match="longer than 256 MiB"):
        open_with_little_memory(path) if sys.platform == "linux" else File(path)


# ---- Whatever else


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.integers(0, len(b.valid()) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_changed_bytes_never_do_harm(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(b.valid())
    for at, byte in changes:
        content[at] = byte
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    with contextlib.suppress(errors.ModelFileError), File(path) as file:
        for found in file.tensors:
            assert len(bytes(found.data)) == found.type.n_bytes(found.n_rows, found.n_cols)
        for name in file.keys:
            file.keys[name]


def test_error_texts_are_one_line_whatever_the_names(refused: Refused) -> None:
    text = refused(gguf([key("evil\n\x1b[31mname", b.BOOL, 9)]), "a bool of value 9")
    assert "\x1b" not in text


def test_nothing_leaks_from_refused_files(tmp_path: Path) -> None:
    contents = [b.valid()[:n] for n in (0, 4, 30, 60, 200, len(b.valid()) - 1)]
    paths = [tmp_path / f"{i}.gguf" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    before = len(os.listdir("/dev/fd"))
    for _ in range(50):
        for path in paths:
            with pytest.raises(errors.ModelFileError):
                File(path)
    assert len(os.listdir("/dev/fd")) == before


SHORTENED = """
import os, sys
from dgemma import errors
from dgemma._native import Model, Session
model = Model(sys.argv[1], use_mmap=sys.argv[2] == "mmap")
session = Session(model, n_ctx=256)
session.prefill([2, 2])
os.truncate(sys.argv[1], 4096)
try:
    session.prefill([2, 2])
except errors.ModelFileError as error:
    print(error)
else:
    print("as before")
"""


@pytest.mark.parametrize(
    ("how", "expected"), [("mmap", "the file was changed while in use"), ("read", "as before")]
)
def test_file_shortened_while_in_use(
    gguf_file: Callable[..., Path], tmp_path: Path, how: str, expected: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file("small").read_bytes())
    run = subprocess.run(
        [sys.executable, "-c", SHORTENED, path, how], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert expected in run.stdout
