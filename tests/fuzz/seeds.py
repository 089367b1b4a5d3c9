"""Writes the seed corpus: small files that together reach every branch of the parsers.

python tests/fuzz/seeds.py
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import support.gguf_builder as b  # noqa: E402 (beside the tests, not installed)


def gguf_seeds() -> dict[str, bytes]:
    """Name → content. Good files and bad ones: a mutation of either may find a way in."""
    numbers = [
        b.key(f"k{type}", type, 1)
        for type in (b.UINT8, b.INT8, b.UINT16, b.INT16, b.UINT32, b.INT32, b.UINT64, b.INT64)
    ]
    reals = [b.key("f32", b.FLOAT32, 0.5), b.key("f64", b.FLOAT64, 0.25), b.key("bool", b.BOOL, 1)]
    arrays = [
        b.array("ints", b.INT32, [1, 2, 3, 4]),
        b.array("bools", b.BOOL, [1, 0, 1, 0]),
        b.array("texts", b.STRING, ["", "a", "▁bc"]),
        b.array("none", b.STRING, []),
    ]
    types = {0: 4, 1: 2, 2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 10: 84, 11: 110, 12: 144, 13: 176}
    types |= {14: 210, 16: 66, 17: 74, 18: 98, 20: 18, 21: 110, 22: 82, 23: 136, 30: 2, 40: 36}
    every_type, offset = [], 0
    for type, block_bytes in types.items():
        n_blocks = 256 if type in (0, 1, 30) else 8 if block_bytes < 40 else 1
        n_cols = 64 * n_blocks if type == 40 else 256
        every_type.append(b.tensor(f"type{type}", [n_cols], type, offset))
        offset += -(-n_blocks * block_bytes // 32) * 32
    shards = [
        b.gguf(
            [
                b.key("split.no", b.UINT16, i),
                b.key("split.count", b.UINT16, 2),
                b.key("split.tensors.count", b.INT32, 2),
                b.key("general.name", b.STRING, "m"),
            ],
            [b.tensor(f"t{i}", [4])],
            bytes(16),
        )
        for i in range(2)
    ]
    return {
        "valid": b.valid(),
        "empty": b.gguf(),
        "version2": b.gguf(b.SOME_KEYS, b.SOME_TENSORS, b.SOME_DATA, version=2),
        "numbers": b.gguf(numbers + reals),
        "arrays": b.gguf(arrays),
        "alignment64": b.gguf(
            [b.key("general.alignment", b.UINT32, 64)],
            [b.tensor("t", [4, 2, 1, 3]), b.tensor("u", [], offset=128)],
            bytes(132),
            alignment=64,
        ),
        "every_type": b.gguf([], every_type, bytes(offset)),
        "shards": b"--NEXT-SHARD--".join(shards),
        "shard_missing": shards[0],
        "shards_swapped": b"--NEXT-SHARD--".join(shards[::-1]),
        "shard_doubled": b"--NEXT-SHARD--".join([shards[0]] * 2),
        "big_endian": b.valid()[:4] + b"\0\0\0\3" + b.valid()[8:],
        "cut_in_key": b.valid()[:60],
        "cut_in_data": b.valid()[:-1],
        "twice": b.gguf([b.key("a", b.UINT8, 1)] * 2),
        "overlap": b.gguf([], [b.tensor("t", [4]), b.tensor("u", [4])], bytes(32)),
        "many_dims": b.gguf([], [b.tensor("t", [1] * 5)], bytes(32)),
        "huge": b.gguf([], [b.tensor("t", [2**31, 2**31])], bytes(32)),
        "nested": b.gguf([b.string("a") + b.u32(b.ARRAY) + b.u32(b.ARRAY) + b.u64(1)]),
        "not_utf8": b.gguf([b.key("a", b.STRING, b"\xed\xa0\x80")]),
    }


def session_seeds() -> dict[str, bytes]:
    """Sessions of the model that run.sh makes: of any length that the context allows."""
    import dgemma
    from support import small_model

    seeds = {}
    with tempfile.TemporaryDirectory() as folder:
        model, saved = small_model.write(Path(folder) / "model.gguf"), Path(folder) / "session"
        for n in (0, 1, 9, 20):
            with dgemma.DiffusionGemma(model, n_ctx=128, n_batch=8, n_threads=1) as llm:
                llm.default_session.prefill([7 * i % 64 for i in range(n)])
                llm.save(saved)
            seeds[f"tokens{n}"] = saved.read_bytes()
    seeds["cut"] = seeds["tokens9"][:-7]
    seeds["header"] = seeds["tokens9"][:47]
    return seeds


def model_seeds() -> dict[str, bytes]:
    """Lists of changes to the small model: fuzz_model.c says what the six bytes of one mean."""
    seeds = {"none": b""}
    for what in range(8):
        seeds[f"key{what}"] = bytes([0, 3 + 5 * what, what, 5, 1, 0])
        seeds[f"tensor{what}"] = bytes([1, 7 * what, what, 3, 1, 0])
    seeds["other_layout"] = b"".join(
        [bytes([1, 2, 4, 0, 0, 0])] + [bytes([1, i, 0, 0, 0, 0]) for i in (21, 43)]
    )
    seeds["two"] = seeds["key2"] + seeds["tensor3"]
    return seeds


def rows_seeds() -> dict[str, bytes]:
    """A block or two of each type: fuzz_rows.c has their order."""
    block_bytes = (
        4,
        2,
        2,
        18,
        20,
        22,
        24,
        34,
        84,
        110,
        144,
        176,
        210,
        66,
        74,
        98,
        18,
        110,
        82,
        136,
        36,
    )
    return {
        f"type{i}": bytes([i]) + bytes((7 * j + i) % 256 for j in range(n + n // 2))
        for i, n in enumerate(block_bytes)
    }


SAMPLING = struct.pack("<i3fif", 48, 0.5, 0.8, 0.1, 3, 0.3)


def canvas_seeds() -> dict[str, bytes]:
    """Parameters that are good, and a canvas of which half is pinned."""
    numbers = struct.pack("<13i", 0, 1, 2, 3, 4, -1, 5, -1, 6, 1, 2, 3, 4)
    pins, entropies = bytes([255, 5] * 12), struct.pack("<24f", *(i / 8 for i in range(24)))
    return {
        "params": b"\0\7" + SAMPLING + numbers + numbers[:16] + struct.pack("<i", 1),
        "settle": b"\1\x17"
        + struct.pack("<Q", 1)
        + SAMPLING
        + struct.pack("<i", 2)
        + pins
        + entropies,
    }


def options_seeds() -> dict[str, bytes]:
    """A session's parameters, whole and of an older header, and a GPU that has room or has not."""
    params = struct.pack("<Q5ifi", 40, 0, 8, 1, 1, 1, 1e-6, 4)
    return {
        "whole": b"\1" + params + struct.pack("<Qiii", 2**33, -1, 0, 60),
        "little_room": b"\1" + params + struct.pack("<Qiii", 2**28 + 2**25, -1, 1, 60),
        "older": b"\4" + params + struct.pack("<Qiii", 0, 1, 1, 1),
    }


def write(folder: Path, seeds: dict[str, bytes]) -> None:
    """Writes each seed to a file of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds.items():
        (folder / name).write_bytes(content)
    print(f"{folder}: {len(seeds)} files, {sum(map(len, seeds.values()))} bytes")


if __name__ == "__main__":
    write(HERE / "corpus" / "gguf", gguf_seeds())
    write(HERE / "corpus" / "session", session_seeds())
    write(HERE / "corpus" / "model", model_seeds())
    write(HERE / "corpus" / "rows", rows_seeds())
    write(HERE / "corpus" / "canvas", canvas_seeds())
    write(HERE / "corpus" / "options", options_seeds())
