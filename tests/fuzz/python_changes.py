"""How fuzz_python.py changes its inputs: values of JSON, which stays JSON, and bytes."""

# ruff: noqa: E501  # a table reads better in its lines

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 1e308, 0.5, "", "x", "\0", "\u2581", [], {},
    [[]], {"": None}, [None] * 3, {"type": "object"}, {"$ref": "#"}, "1", "auto", "<|turn>", "a" * 300,
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Containers and keys of all values in a JSON value."""
    found, pending = [], [value]
    while pending and len(found) < 2000:
        holder = pending.pop()
        entries = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in entries:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                pending.append(holder[key])
    return found


def changed_json(data: bytes, draw: random.Random) -> bytes | None:
    """The input with some of its values changed; None where it is no JSON."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return None
    for _ in range(draw.randint(1, 3)):
        found = places(root)
        holder, key = draw.choice(found)
        kind = draw.randrange(7)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1:
            other, name = draw.choice(found)
            with contextlib.suppress(KeyError, IndexError, ValueError, RecursionError):
                holder[key] = json.loads(json.dumps(other[name]))
        elif kind == 2 and isinstance(holder, dict):
            holder[draw.choice(["type", "$ref", "content", "name", "role", str(key) + "x"])] = holder[key]  # fmt: skip
        elif kind == 3:
            for _ in range(draw.choice((1, 3, 120))):
                holder[key] = draw.choice(([holder[key]], {"items": holder[key]}))
        elif kind == 4 and isinstance(holder, list) and holder is not root:
            holder[key:key] = holder[: draw.choice((1, 40))]
        elif kind == 5 and isinstance(holder[key], str):
            text = holder[key]
            at = draw.randrange(len(text) + 1)
            holder[key] = text[:at] + draw.choice(("\0", "{", '"', "é", "▁", text)) + text[at:]
        else:
            holder[key] = draw.choice(STRANGE)
    with contextlib.suppress(RecursionError, ValueError):
        return json.dumps(root[0]).encode()
    return None


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """The input with some of its bytes changed, doubled or taken out."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, n = draw.randrange(len(made) + 1), draw.randint(1, 16)
        kind = draw.randrange(5)
        if kind == 0:
            made[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            made[at : at + 1] = bytes([draw.choice(b"{}[]\",:-.eE0179ntf\\<|>'= ")])
        elif kind == 2:
            made[at:at] = made[at : at + n]
        elif kind == 3:
            del made[at : at + n]
        else:
            made[at : at + 4] = draw.choice((0, 1, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
    return bytes(made)
