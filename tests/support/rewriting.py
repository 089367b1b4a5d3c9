"""A GGUF file written again with some keys and tensors changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import support.gguf_builder as b
from dgemma.gguf_file import File

ALIGNMENT = 32


def rewrite(
    source: Path,
    target: Path,
    keys: Mapping[str, bytes | None] | None = None,
    rename: Callable[[str], str | None] = lambda name: name,
) -> Path:
    """Copies `source` to `target`.

    `keys`: entries made by gguf_builder that stand in place of those of the same names or beside
    them, None to leave one out. `rename`: new names of tensors, None to leave one out.
    """
    changed = dict(keys or {})
    entries, tensors, data = [], [], b""
    with File(source) as file:
        for name, value in file.keys.items():
            if name in changed:
                entry = changed.pop(name)
            else:
                entry = _entry(name, *file.keys.type_of(name), value)
            if entry is not None:
                entries.append(entry)
        for tensor in file.tensors:
            new = rename(tensor.name)
            if new is not None:
                sizes = tuple(reversed(tensor.shape))
                tensors.append(b.tensor(new, sizes, tensor.type.id, offset=len(data)))
                data += tensor.data.tobytes() + bytes(-len(tensor.data) % ALIGNMENT)
    entries += [entry for entry in changed.values() if entry is not None]
    target.write_bytes(b.gguf(entries, tensors, data))
    return target


def _entry(name: str, type: int, element_type: int, value: Any) -> bytes:
    if type == b.ARRAY:
        return b.array(name, element_type, value)
    return b.key(name, type, value)
