"""GGUF files byte by byte: what no writer would produce, to see that the reader refuses it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = (
    range(13)
)
F32, Q4_0, Q8_0 = 0, 2, 8
FORMATS = {
    UINT8: "<B",
    INT8: "<b",
    UINT16: "<H",
    INT16: "<h",
    UINT32: "<I",
    INT32: "<i",
    FLOAT32: "<f",
    BOOL: "<B",
    UINT64: "<Q",
    INT64: "<q",
    FLOAT64: "<d",
}


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number % 2**64)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string; `length` is what the file claims it to be."""
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data) if length is None else length) + data


def value(type: int, content: object) -> bytes:
    """One value without its type."""
    if type == STRING:
        assert isinstance(content, str | bytes)
        return string(content)
    return struct.pack(FORMATS[type], content)


def key(name: str | bytes, type: int, content: object) -> bytes:
    return string(name) + u32(type) + value(type, content)


def array(name: str, type: int, contents: Sequence[object], n: int | None = None) -> bytes:
    """An array key; `n` is the number of elements that the file claims."""
    elements = b"".join(value(type, content) for content in contents)
    return string(name) + u32(ARRAY) + u32(type) + u64(len(contents) if n is None else n) + elements


def tensor(
    name: str | bytes,
    sizes: Sequence[int],
    type: int = F32,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    """An entry of the tensor list; `sizes` are in the file's order, columns first."""
    n = len(sizes) if n_dims is None else n_dims
    return string(name) + u32(n) + b"".join(map(u64, sizes)) + u32(type) + u64(offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; `n_tensors` and `n_keys` are what it claims to hold."""
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


SOME_KEYS = (
    key("general.architecture", STRING, "diffusion-gemma"),
    key("a.count", UINT32, 7),
    key("a.flag", BOOL, 1),
    array("a.tokens", STRING, ["<pad>", "▁a", ""]),
)
SOME_TENSORS = (tensor("first", [4, 2]), tensor("second", [32, 3], Q8_0, offset=32))
SOME_DATA = bytes(32 + 3 * 34)


def valid() -> bytes:
    """A small file with nothing wrong in it."""
    return gguf(SOME_KEYS, SOME_TENSORS, SOME_DATA)
