"""Checkpoint folders damaged at random: files, links, JSON values, headers, tensors, the index."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.opening import check_file
from dgemma_convert import ConvertError, convert

JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
OUTTYPES = ("f32", "bf16", "q8_0", "q4_0", "q4_k_m", "nvfp4", "auto")
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.5, -0.0, 2**31, 2**63, 10**40, 1e308, float("nan"), "", "x",
    "\ud800", "▁", "\0", [], {}, [1], [[]], {"a": 1}, [None] * 3, "1", ["a", "b"],
)  # fmt: skip
HEADS = (b"", b"\0", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"GGUF",
         b"PK\x03\x04", b"\xff\xfe", b"[" * 100_000, b"{" * 50, b"\xef\xbb\xbf")  # fmt: skip

Rng = np.random.Generator
Place = tuple[Any, Any]  # a container and a key of it


@dataclass
class Found:
    """What became of the damaged folders; `kinds`: (refused, converted) by the kind of damage."""

    cases: int = 0
    refused: int = 0
    converted: int = 0
    faults: list[str] = field(default_factory=list)
    kinds: dict[str, list[int]] = field(default_factory=dict)


def try_damaged(source: Path, folder: Path, cases: int, seed: int) -> Found:
    """Damages copies of `source` one after the other, and converts them."""
    found = Found()
    kinds = [file, link, json_value, json_text, header, tensor_bytes, shards, extra_files]
    for number in range(cases):
        rng = np.random.default_rng([seed, number])
        copy, out = folder / "copy", folder / "out"
        shutil.copytree(source, copy)
        out.mkdir()
        chosen = [kinds[int(rng.integers(len(kinds)))] for _ in range(int(rng.integers(1, 4)))]
        outtype = str(rng.choice(OUTTYPES))
        for damage in chosen:
            damage(copy, rng)
        name = f"case {number} ({', '.join(k.__name__ for k in chosen)}; {outtype})"
        refused = _convert(copy, out, outtype, name, found)
        found.cases += 1
        found.refused += refused
        found.converted += not refused
        found.kinds.setdefault(chosen[0].__name__, [0, 0])[not refused] += 1
        shutil.rmtree(copy)
        shutil.rmtree(out)
    return found


def _convert(copy: Path, out: Path, outtype: str, name: str, found: Found) -> bool:
    """Whether the folder was refused; what should not happen is added to the faults."""
    target = out / "model.gguf"
    try:
        convert(copy, target, outtype, progress=False)
    except ConvertError as refused:
        if "\n" in str(refused) or not str(refused):
            found.faults.append(f"{name}: not one line: {refused!r:.300}")
        if list(out.iterdir()):
            found.faults.append(f"{name}: refused, but left {list(out.iterdir())}")
        return True
    except Exception as problem:  # a fault, whatever it is
        found.faults.append(f"{name}: {type(problem).__name__}: {problem!s:.300}")
        return True
    try:
        check_file(target)
    except Exception as problem:
        found.faults.append(f"{name}: wrote what does not open: {problem!s:.300}")
    return False


# ---- Kinds of damage -----------------------------------------------------------------------------


def _file(copy: Path, rng: Rng) -> Path:
    files = sorted(path for path in copy.iterdir() if not path.is_symlink() and path.is_file())
    return files[int(rng.integers(len(files)))]


def file(copy: Path, rng: Rng) -> None:
    """A file is gone, cut short, longer, or begins with something else."""
    path = _file(copy, rng)
    data, kind = path.read_bytes(), int(rng.integers(5))
    if kind == 0:
        path.unlink()
        if len(list(copy.iterdir())) == 0:
            path.write_bytes(data)
    elif kind == 1:
        path.write_bytes(data[: int(rng.integers(len(data) + 1))])
    elif kind == 2:
        path.write_bytes(data + rng.bytes(int(rng.integers(1, 100))))
    elif kind == 3:
        path.write_bytes(HEADS[int(rng.integers(len(HEADS)))])
    else:
        path.write_bytes(HEADS[int(rng.integers(len(HEADS)))] + data)


def link(copy: Path, rng: Rng) -> None:
    """A file becomes a link, to nothing, to itself, to another; or a folder or a pipe."""
    path, kind = _file(copy, rng), int(rng.integers(5))
    moved = copy.parent / "elsewhere"
    if kind < 3:
        shutil.move(path, moved)
        path.symlink_to((moved, path.name, "../nowhere")[kind])
    else:
        path.unlink()
        (path.mkdir if kind == 3 else lambda: os.mkfifo(path))()


def _places(content: Any) -> list[Place]:
    """Every value in a JSON text, but few of a long list or object."""
    found: list[Place] = []
    pending = [content]
    while pending and len(found) < 5000:
        value = pending.pop()
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:20] + keys[-5:]:
            found.append((value, key))
            if isinstance(value[key], (dict, list)):
                pending.append(value[key])
    return found


def json_value(copy: Path, rng: Rng) -> None:
    """A value in a JSON file is another one, is gone, or is there twice."""
    path = copy / JSON_FILES[int(rng.integers(len(JSON_FILES)))]
    if not path.is_file() or path.is_symlink():
        return
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    places = _places(content) if isinstance(content, (dict, list)) else []
    if not places:
        return
    holder, key = places[int(rng.integers(len(places)))]
    kind = int(rng.integers(4))
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}_other"] = holder[key]
    else:
        holder[key] = STRANGE[int(rng.integers(len(STRANGE)))]
    path.write_text(json.dumps(content))


def json_text(copy: Path, rng: Rng) -> None:
    """Bytes of a JSON file are changed."""
    path = copy / JSON_FILES[int(rng.integers(len(JSON_FILES)))]
    if path.is_symlink() or not path.is_file() or not path.stat().st_size:
        return
    data = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(data)))
        data[at : at + int(rng.integers(3))] = rng.choice([*b'{}[]",:-.eE019ntf\\']).tobytes()[:1]
    path.write_bytes(bytes(data))


def _parts(copy: Path) -> tuple[Path, dict[str, Any], bytes] | None:
    path = copy / "model.safetensors"
    if path.is_symlink() or not path.is_file():
        return None
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + n])
    except (ValueError, RecursionError):
        return None
    return (path, header, data[8 + n :]) if isinstance(header, dict) and header else None


def header(copy: Path, rng: Rng) -> None:
    """An entry of the safetensors header is changed, renamed, doubled or gone."""
    parts = _parts(copy)
    if parts is None:
        return
    path, entries, data = parts
    name = list(entries)[int(rng.integers(len(entries)))]
    entry, kind = entries[name], int(rng.integers(6))
    if kind == 0:
        del entries[name]
    elif kind == 1:
        entries[f"{name}x"] = entries.pop(name)
    elif kind == 2:
        entries[f"{name}.copy"] = entry
    elif isinstance(entry, dict) and entry:
        key = list(entry)[int(rng.integers(len(entry)))]
        if kind == 3:
            entry[key] = STRANGE[int(rng.integers(len(STRANGE)))]
        elif isinstance(entry[key], list) and entry[key]:
            at = int(rng.integers(len(entry[key])))
            entry[key][at] = STRANGE[int(rng.integers(len(STRANGE)))]
        else:
            entry[key] = str(rng.choice(["F16", "BF16", "F64", "I32", "F8_E4M3", "U8", "F4"]))
    encoded = json.dumps(entries).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def tensor_bytes(copy: Path, rng: Rng) -> None:
    """Bytes of a tensor are changed, to numbers and to none."""
    parts = _parts(copy)
    if parts is None:
        return
    path, _, data = parts
    if not data:
        return
    at = path.stat().st_size - len(data) + int(rng.integers(len(data)))
    with path.open("rb+") as opened:
        opened.seek(at)
        opened.write(bytes((rng.bytes(4), b"\xff" * 8, b"\x80\x7f" * 4)[int(rng.integers(3))]))


def shards(copy: Path, rng: Rng) -> None:
    """An index appears, right or wrong; or the file gets the name of a shard."""
    parts = _parts(copy)
    if parts is None:
        return
    path, entries, _ = parts
    places: dict[str, Any] = {name: path.name for name in entries if name != "__metadata__"}
    kind = int(rng.integers(6))
    if kind == 0:
        path.rename(copy / "model-00001-of-00001.safetensors")
        return
    if kind == 1:
        path.rename(copy / "model-00001-of-00002.safetensors")
        return
    if places and kind == 2:
        places[list(places)[int(rng.integers(len(places)))]] = "none.safetensors"
    elif places and kind == 3:
        places[list(places)[int(rng.integers(len(places)))]] = STRANGE[
            int(rng.integers(len(STRANGE)))
        ]
    elif kind == 4:
        shutil.copy(path, copy / "copy.safetensors")
        places["more"] = "copy.safetensors"
    index = {"weight_map": places} if rng.integers(8) else STRANGE[int(rng.integers(len(STRANGE)))]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))


def extra_files(copy: Path, rng: Rng) -> None:
    """Files that others leave in such folders, whole and broken."""
    extras: list[Callable[[], object]] = [
        lambda: (copy / "README.md").write_text("---\nlicense: [\n---\n"),
        lambda: (copy / "README.md").write_bytes(b"---\n\xff\xfe: \0\n---"),
        lambda: (copy / "README.md").write_text("---\nbase_model: {a: [1, {b: 2}]}\n---\n"),
        lambda: (copy / "chat_template.jinja").write_text("{% for m in messages %}"),
        lambda: (copy / "chat_template.jinja").write_bytes(b"\xff"),
        lambda: (copy / "chat_template.json").write_text("[1]"),
        lambda: (copy / "generation_config.json").write_text('{"eos_token_id": [[1]]}'),
        lambda: (copy / "generation_config.json").write_text('{"t_min": "x"}'),
        lambda: (copy / "special_tokens_map.json").write_text("{"),
        lambda: (copy / "additional_chat_templates").mkdir(exist_ok=True),
        lambda: (copy / "additional_chat_templates").write_text("no folder"),
        lambda: (copy / "adapter_model.safetensors").write_text("no adapter"),
    ]
    try:
        extras[int(rng.integers(len(extras)))]()
    except OSError:
        return  # an earlier damage is in the way
