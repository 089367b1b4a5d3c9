"""Good files: what the `gguf` package and the builder write is read back exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import support.gguf_builder as b
from dgemma import errors
from dgemma._native import File, type_info

VOCABULARY = Path(__file__).parents[3] / "shared/data/gemma4/vocab.gguf"


def save(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SCALARS: dict[str, tuple[str, Any]] = {
    "s.uint8": ("add_uint8", 255),
    "s.int8": ("add_int8", -128),
    "s.uint16": ("add_uint16", 65535),
    "s.int16": ("add_int16", -32768),
    "s.uint32": ("add_uint32", 2**32 - 1),
    "s.int32": ("add_int32", -(2**31)),
    "s.uint64": ("add_uint64", 2**64 - 1),
    "s.int64": ("add_int64", -(2**63)),
    "s.float32": ("add_float32", 0.15625),
    "s.float64": ("add_float64", 0.1),
    "s.true": ("add_bool", True),
    "s.false": ("add_bool", False),
    "s.string": ("add_string", "ä ▁ 𝄞 \n\0 end"),
}

ARRAYS: dict[str, Any] = {
    "a.uint8": bytes(range(256)),
    "a.int8": [-128, 127],
    "a.uint16": [0, 65535],
    "a.int16": [-32768],
    "a.uint32": [2**32 - 1, 0],
    "a.int32": [1, -2, 3],
    "a.uint64": [2**64 - 1],
    "a.int64": [2**40, -(2**40)],
    "a.bool": [True, False, True],
    "a.float32": [0.5, -1.25, 3.0],
    "a.float64": [0.1, -1e300],
    "a.string": ["", "one", "▁two", "x" * 1000],
}


def test_every_value_type_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    for name, (method, value) in SCALARS.items():
        getattr(writer, method)(name, value)
    for name, values in ARRAYS.items():
        kind = gguf.GGUFValueType[name.removeprefix("a.").upper()]
        writer.add_key_value(name, values, gguf.GGUFValueType.ARRAY, kind)
    save(writer)

    with File(path) as file:
        keys = file.keys
        for name, (_, value) in SCALARS.items():
            assert keys[name] == value, name
            assert type(keys[name]) is type(value), name
        for name, values in ARRAYS.items():
            assert keys[name] == list(values), name
        assert keys["general.architecture"] == "diffusion-gemma"
        assert len(keys) == len(SCALARS) + len(ARRAYS) + 1
        assert "s.missing" not in keys
        with pytest.raises(KeyError):
            keys["s.missing"]


def test_empty_arrays_strings_and_files(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(
        b.gguf(
            [
                b.array("numbers", b.UINT32, []),
                b.array("texts", b.STRING, []),
                b.key("text", b.STRING, ""),
            ]
        )
    )
    with File(path) as file:
        assert dict(file.keys) == {"numbers": [], "texts": [], "text": ""}
        assert file.tensors == []
    path.write_bytes(b.gguf())
    with File(path) as file:
        assert dict(file.keys) == {}
        assert file.n_bytes == path.stat().st_size


NOT_READ = {"Q8_1", "Q8_K", "IQ1_S", "IQ1_M", "I8", "I16", "I32", "I64", "F64", "TQ1_0", "TQ2_0"}
NOT_READ |= {"MXFP4", "Q1_0", "Q2_0"}  # types that no published file of this model uses


def tensors_of_every_type() -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]:
    """Name → (array as the writer wants it, its type where it is raw bytes)."""
    random = np.random.default_rng(1)
    found: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]] = {
        "one.weight": (random.standard_normal(7, np.float32), None),
        "two.weight": (random.standard_normal((5, 32), np.float32), None),
        "three.weight": (random.standard_normal((3, 4, 8), np.float32), None),
        "four.weight": (random.standard_normal((2, 3, 4, 8)).astype(np.float16), None),
        "n" * 64: (random.standard_normal((1, 1), np.float32), None),
    }
    for kind in gguf.GGMLQuantizationType:
        if kind.name not in NOT_READ | {"F32", "F16"}:
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            n_bytes = max(1, 256 // block_size) * block_bytes
            rows = random.integers(0, 256, (3, n_bytes), np.uint8)
            found[f"type.{kind.name}"] = (rows, kind)
    return found


@pytest.mark.parametrize("alignment", [None, 8, 32, 64, 4096])
def test_tensors_are_read_back(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "tensors.gguf"
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    tensors = tensors_of_every_type()
    assert len(tensors) > 20
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    save(writer)

    judge = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with File(path) as file:
        found = {tensor.name: tensor for tensor in file.tensors}
        assert list(found) == list(tensors)
        for name, tensor in found.items():
            assert tensor.shape == tuple(int(n) for n in reversed(judge[name].shape)), name
            assert tensor.type.id == judge[name].tensor_type, name
            assert bytes(tensor.data) == tensors[name][0].tobytes(), name
            assert file.tensor(name).data.ctypes.data == tensor.data.ctypes.data
            assert not tensor.data.flags.writeable
        with pytest.raises(KeyError):
            file.tensor("missing.weight")


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType)
def test_block_sizes_are_those_of_the_format(kind: gguf.GGMLQuantizationType) -> None:
    if kind.name in NOT_READ:
        with pytest.raises(ValueError, match=str(kind.value)):
            type_info(kind.value)
        return
    info = type_info(kind.value)
    assert (info.block_size, info.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert info.name == kind.name.lower()


def test_version_2_gaps_order_scalars_and_missing_end(tmp_path: Path) -> None:
    # All of it is allowed, and none of it is what the package writes.
    path = tmp_path / "unusual.gguf"
    data = np.arange(40, dtype=np.float32)
    tensors = [
        b.tensor("late", [4], offset=128),
        b.tensor("early", [2, 3]),
        b.tensor("scalar", [], offset=64),
    ]
    path.write_bytes(b.gguf([], tensors, data.tobytes()[: 128 + 16], version=2))
    with File(path) as file:
        late, early, scalar = file.tensors
        assert (late.name, early.name, scalar.name) == ("late", "early", "scalar")
        assert (late.shape, early.shape, scalar.shape) == ((4,), (3, 2), (1,))
        assert list(late.data.view(np.float32)) == [32, 33, 34, 35]
        assert list(early.data.view(np.float32)) == [0, 1, 2, 3, 4, 5]
        assert list(scalar.data.view(np.float32)) == [16]


def test_many_keys_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "many.gguf"
    n = 5000
    keys = [b.key(f"key.{i}", b.UINT32, i) for i in range(n)]
    tensors = [b.tensor(f"tensor.{i}", [8], offset=32 * i) for i in range(n)]
    path.write_bytes(b.gguf(keys, tensors, np.repeat(np.arange(n, dtype=np.float32), 8).tobytes()))
    with File(path) as file:
        assert list(file.keys) == [f"key.{i}" for i in range(n)]
        for i in (0, 1, 777, n - 1):
            assert file.keys[f"key.{i}"] == i
            assert file.tensor(f"tensor.{i}").data.view(np.float32)[7] == i


def test_shards_are_one_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "diffusion-gemma", split_max_tensors=3)
    writer.add_name("sharded")
    arrays = {f"t{i}.weight": np.full((2, 8 + i), i, np.float32) for i in range(8)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    save(writer)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in paths] == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]

    with File(paths[0]) as file:
        assert file.keys["general.name"] == "sharded"
        assert file.n_bytes == sum(path.stat().st_size for path in paths)
        assert [tensor.name for tensor in file.tensors] == list(arrays)
        for name, array in arrays.items():
            assert bytes(file.tensor(name).data) == array.tobytes()
    with pytest.raises(errors.ModelFileError, match="open the first one"):
        File(paths[2])


def test_shards_may_be_links(tmp_path: Path) -> None:
    # Download caches keep files under other names and link to them.
    (tmp_path / "blobs").mkdir()
    for i in range(2):
        keys = [
            b.key("split.no", b.UINT16, i),
            b.key("split.count", b.UINT16, 2),
            b.key("split.tensors.count", b.INT32, 2),
        ]
        blob = tmp_path / "blobs" / f"blob{i}"
        blob.write_bytes(b.gguf(keys, [b.tensor(f"t{i}", [4])], bytes(32)))
        (tmp_path / f"m-0000{i + 1}-of-00002.gguf").symlink_to(blob)
    with File(tmp_path / "m-00001-of-00002.gguf") as file:
        assert [tensor.name for tensor in file.tensors] == ["t0", "t1"]


def test_data_outlives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.gguf"
    path.write_bytes(b.gguf([], [b.tensor("t", [4])], np.arange(8, dtype=np.float32).tobytes()))
    with File(path) as file:
        data = file.tensor("t").data
    path.unlink()
    assert list(data.view(np.float32)) == [0, 1, 2, 3]
    with pytest.raises(errors.Error, match="closed"):
        file.tensor("t")


@pytest.mark.skipif(not VOCABULARY.exists(), reason="the Gemma 4 vocabulary is not on this machine")
def test_the_real_vocabulary() -> None:
    with File(VOCABULARY) as file:
        keys = file.keys
        assert len(keys) == 42
        assert keys["tokenizer.ggml.model"] == "gemma4"
        assert keys["gemma4.attention.sliding_window_pattern"] == [i % 6 != 5 for i in range(30)]
        assert len(keys["tokenizer.ggml.scores"]) == 262_144
        assert len(keys["tokenizer.ggml.merges"]) == 514_906
        tokens = keys["tokenizer.ggml.tokens"]
        assert len(tokens) == len(set(tokens)) == 262_144
        assert (tokens[0], tokens[1], tokens[2], tokens[106]) == (
            "<pad>",
            "<eos>",
            "<bos>",
            "<turn|>",
        )
        assert file.tensors == []
