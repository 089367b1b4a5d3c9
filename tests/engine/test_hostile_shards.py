"""Shards that are missing, doubled, swapped, damaged or of another model.

Row 8 of the table "Damaged files" in docs/format.md; the others are in test_hostile_files.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import support.gguf_builder as b
from dgemma import errors
from dgemma._native import File
from support.gguf_builder import array, gguf, key, tensor


def shard(number: int, n: int, names: list[str], total: int, *more: bytes) -> bytes:
    keys = [
        key("split.no", b.UINT16, number),
        key("split.count", b.UINT16, n),
        key("split.tensors.count", b.INT32, total),
        *more,
    ]
    tensors = [tensor(name, [4], offset=32 * i) for i, name in enumerate(names)]
    return gguf(keys, tensors, bytes(32 * len(names)))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three good shards, to be spoilt."""
    paths = [tmp_path / f"m-{i + 1:05}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(shard(i, 3, [f"t{i}", f"u{i}"], 6, key("general.name", b.STRING, "m")))
    assert len(File(paths[0]).tensors) == 6
    return paths


def refuse_shards(path: Path, expected: str) -> None:
    with pytest.raises(errors.Error, match=expected) as raised:
        File(path)
    assert "\n" not in str(raised.value)


def test_shard_missing(shards: list[Path]) -> None:
    shards[1].unlink()
    refuse_shards(shards[0], "m-00002-of-00003.gguf: cannot be opened")


def test_not_the_first_shard(shards: list[Path]) -> None:
    refuse_shards(shards[1], r"shard 2 of 3: open the first one, …-00001-of-00003.gguf")


def test_shards_swapped(shards: list[Path]) -> None:
    first = shards[1].read_bytes()
    shards[1].write_bytes(shards[2].read_bytes())
    shards[2].write_bytes(first)
    refuse_shards(shards[0], "00002-of-00003.gguf: the file is shard 3, its name says 2")


def test_shard_doubled(shards: list[Path]) -> None:
    shards[2].write_bytes(shards[1].read_bytes())
    refuse_shards(shards[0], "00003-of-00003.gguf: the file is shard 2, its name says 3")


def test_shard_of_another_model_by_its_keys(shards: list[Path]) -> None:
    shards[1].write_bytes(shard(1, 3, ["t1", "u1"], 6, key("general.name", b.STRING, "other")))
    refuse_shards(shards[0], '00002-of-00003.gguf: key "general.name" differs')
    shards[1].write_bytes(shard(1, 4, ["t1", "u1"], 6))
    refuse_shards(shards[0], '00002-of-00003.gguf: key "split.count" differs')


def test_shard_of_another_model_by_its_tensors(shards: list[Path]) -> None:
    shards[1].write_bytes(shard(1, 3, ["t1"], 6))
    refuse_shards(shards[0], "the shards have 5 tensors, expected 6")
    shards[1].write_bytes(shard(1, 3, ["t0", "u1"], 6))
    refuse_shards(shards[0], 'tensor "t0" is there twice')


def test_shard_without_its_number(shards: list[Path]) -> None:
    shards[1].write_bytes(gguf([], [tensor("t1", [4])], bytes(32)))
    refuse_shards(shards[0], 'key "split.no" is missing')


def test_shard_damaged(shards: list[Path]) -> None:
    shards[2].write_bytes(shards[2].read_bytes()[:-40])
    refuse_shards(shards[0], '00003-of-00003.gguf: tensor "t2".*past the end|00003.*fetch it again')


def test_first_shard_renamed(shards: list[Path]) -> None:
    other = shards[0].with_name("model.gguf")
    shards[0].rename(other)
    refuse_shards(other, "the first of 3 shards, so its name should end with -00001-of-00003.gguf")


@pytest.mark.parametrize("n", [1001, 65535])
def test_too_many_shards(tmp_path: Path, n: int) -> None:
    path = tmp_path / f"m-00001-of-{n:05}.gguf"
    path.write_bytes(shard(0, n, ["t"], 1))
    refuse_shards(path, '"split.count" should be an integer from 0 to 1000')


@pytest.mark.parametrize(
    "bad", [key("split.count", b.STRING, "../../x"), array("split.count", b.UINT16, [3])]
)
def test_count_of_shards_of_another_type(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(gguf([bad]))
    refuse_shards(path, '"split.count" should be an integer')


def test_shard_names_do_not_leave_the_folder(tmp_path: Path) -> None:
    # Only the path that the user gave decides where shards are looked for.
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder / f"m-0000{i + 1}-of-00002.gguf").write_bytes(shard(i, 2, [f"t{i}"], 2))
    refuse_shards(
        tmp_path / "a" / "m-00001-of-00002.gguf", "a/m-00002-of-00002.gguf: cannot be opened"
    )
