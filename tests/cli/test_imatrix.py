"""`dgemma imatrix`, and importance matrices in both of llama.cpp's forms."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dgemma.cli import main
from dgemma.errors import Error
from dgemma.evaluation.calibration import chat_prompts, gather, text_chunks
from dgemma.importance import Importance, means, save_importance
from dgemma.values import Activations
from dgemma_convert import convert
from support import engine

TEXT = "Once there was a small owl that lived near the lake. One day it saw a red boat. " * 6
GATE_UP, Q = "blk.1.ffn_gate_up_exps.weight", "blk.0.attn_q.weight"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_command(tiny_gguf: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "imatrix.gguf"
    command = ["imatrix", "-m", str(tiny_gguf), "-f", str(text), "-o", str(out), "--json"]
    command += ["--chunk-size", "40", "--chunks", "3"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chunks"] == report["canvases"] == 3
    assert report["prompt_tokens"] == 120
    assert report["experts"] == 4 * 8

    reader = gguf.GGUFReader(out)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == [str(text)]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (3, 40)
    assert "general.architecture" not in keys  # llama.cpp's have none
    found = {t.name: t.data for t in reader.tensors}
    # A head's row is counted once a step, a prompt's token only where it is encoded.
    steps = report["steps"] * 32
    assert found["token_embd.weight.counts"].tolist() == [[steps]]
    assert found["self_cond_gate.weight.counts"].tolist() == [[steps - 3 * 32]]
    assert found[Q + ".counts"].tolist() == [[steps + 120]]
    assert found[GATE_UP + ".in_sum2"].shape == (8, 256)
    assert found[GATE_UP + ".counts"].shape == (8, 1)
    assert found[GATE_UP + ".counts"].sum() == 2 * (steps + 120)

    # The same again: refused without --force, and then the same bytes.
    before = out.read_bytes()
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force", "--threads", "2"]) == 0
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["imatrix.gguf", "text.txt"]


def test_both_forms_say_the_same(tiny_gguf: Path, tmp_path: Path) -> None:
    with engine.open_model(tiny_gguf) as llm:
        found = gather(llm, text_chunks(llm, TEXT, 50)[:2], canvases=2)
    sums = np.array([[9.0, 8, 7, 6], [0, 0, 0, 0], [1, 2, 3, 4]])
    rare = Activations(sums, np.array([1000, 0, 3]))
    collected = {**found.activations, "experts": rare}
    read = []
    for name in ("i.gguf", "i.dat"):
        save_importance(tmp_path / name, collected, dataset="a text", chunk_count=7, chunk_size=50)
        importance = Importance(tmp_path / name)
        assert (importance.datasets, importance.chunk_count) == (["a text"], 7)
        assert len(importance) == len(collected)
        read.append(importance)
    for name, activations in collected.items():
        one, other = (i.of(name, *activations.sums.shape) for i in read)
        assert one is not None
        np.testing.assert_allclose(one, other, rtol=1e-5)
        np.testing.assert_allclose(one, means(activations.sums, activations.counts), rtol=1e-5)
    average = rare.sums.sum(0) / 1003
    np.testing.assert_allclose(read[0].of("experts", 3, 4)[1], average, rtol=1e-5)


def dat(entries: dict[str, tuple[int, np.ndarray]], tail: bytes) -> bytes:
    """A file as llama.cpp's older tools write it."""
    data = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<i", n_calls)
        data += struct.pack("<i", values.size) + values.astype("<f4").tobytes()
    return data + tail


def test_older_files(tmp_path: Path) -> None:
    values = np.array([[2.0, 4.0], [6.0, 8.0]])
    path = tmp_path / "imatrix.dat"
    path.write_bytes(dat({"w": (2, values)}, struct.pack("<ii", 5, 8) + b"wiki.txt"))
    importance = Importance(path)
    assert (importance.datasets, importance.chunk_count) == (["wiki.txt"], 5)
    np.testing.assert_array_equal(importance.of("w", 2, 2), values / 2)
    with pytest.raises(Error, match="another model"):
        importance.of("w", 1, 2)
    path.write_bytes(dat({"w": (2, values)}, b""))  # the oldest end here
    assert Importance(path).datasets == []


WHOLE = dat({"w": (2, np.ones(4))}, struct.pack("<ii", 5, 1) + b"x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        struct.pack("<i", 0),
        struct.pack("<i", -1) + bytes(100),
        struct.pack("<i", 2**31 - 1) + bytes(100),
        struct.pack("<ii", 1, -5) + bytes(100),
        struct.pack("<ii", 1, 2**31 - 1) + bytes(100),
        dat({"w": (2, np.array([1.0, np.nan]))}, b""),
        dat({"w": (2, np.array([1.0, -1.0]))}, b""),
        *(WHOLE[:n] for n in range(1, len(WHOLE)) if n != len(WHOLE) - 9),
    ],
)
def test_damaged_older_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(Error, match=r"imatrix\.dat"):
        Importance(path)


def test_conversion_uses_it(tiny: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """With what the model's own activations weigh, the error they see becomes smaller."""
    with engine.open_model(tiny_gguf) as llm:
        found = gather(llm, text_chunks(llm, TEXT, 60)).activations
    imatrix = tmp_path / "imatrix.dat"
    save_importance(imatrix, found, dataset="/somewhere/text.txt", chunk_count=3, chunk_size=60)
    files = {}
    for name, outtype, with_it in (("exact", "f32", 0), ("plain", "q4_0", 0), ("own", "q4_0", 1)):
        path = tmp_path / f"{name}.gguf"
        convert(tiny, path, outtype, imatrix=imatrix if with_it else None, progress=False)
        reader = gguf.GGUFReader(path)
        files[name] = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors
        }
    fields = gguf.GGUFReader(tmp_path / "own.gguf").fields
    assert fields["quantize.imatrix.dataset"].contents() == "text.txt"
    assert fields["quantize.imatrix.chunks_count"].contents() == 3
    for name in (Q, GATE_UP, "blk.2.ffn_down.weight", "blk.3.ffn_down_exps.weight"):
        weights = means(found[name].sums, found[name].counts)[..., None, :]
        plain, own = (
            float(np.sum(weights * (files[kind][name] - files["exact"][name]) ** 2))
            for kind in ("plain", "own")
        )
        assert own < 0.99 * plain, name  # trained for Q4_0, there is little to gain


def test_prompts(tiny_gguf: Path) -> None:
    with engine.open_model(tiny_gguf) as llm:
        tokens = llm.tokenizer.encode(TEXT, special=False)
        chunks = text_chunks(llm, TEXT, 30)
        assert all(chunk[0] == llm.token_bos() and len(chunk) <= 30 for chunk in chunks)
        joined = [token for chunk in chunks for token in chunk[1:]]
        assert joined == tokens[: len(joined)]
        assert len(tokens) - len(joined) < 15
        assert text_chunks(llm, "owl", 30)[0][1:] == llm.tokenizer.encode("owl", special=False)
        with pytest.raises(ValueError, match="at least 2"):
            text_chunks(llm, TEXT, 1)
        chats = chat_prompts(llm, "What is 27 + 8?\n\nSort the digits: 5 2 9 1\n")
        assert [llm.tokenizer.decode(c, special=True) for c in chats] == [
            llm.chat_template.render([{"role": "user", "content": question}])
            for question in ("What is 27 + 8?", "Sort the digits: 5 2 9 1")
        ]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--chunks", "0"], "expected 1 or more"),
        (["-o", "nowhere/i.gguf"], "existing folder"),
        (["-f", "none.txt"], "none.txt"),
        (["-f", "empty.txt"], "no text"),
    ],
)
def test_wrong_use(
    tiny_gguf: Path, text: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch,
    options: list[str], match: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(text.parent)
    Path("empty.txt").write_text("")
    assert main(["imatrix", "-m", str(tiny_gguf), "-f", str(text), *options]) == 1
    assert match in capsys.readouterr().err


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "i.gguf"
    collected = {"w": Activations(np.ones((1, 4)), np.array([3]))}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Error, match="no space left"):
        save_importance(path, collected, dataset="x", chunk_count=1, chunk_size=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Error, match="nothing was collected"):
        save_importance(path, {}, dataset="x", chunk_count=1, chunk_size=1)
    broken = {"w": Activations(np.full((1, 4), np.inf), np.array([3]))}
    with pytest.raises(Error, match="what met w is not finite"):
        save_importance(path, broken, dataset="x", chunk_count=1, chunk_size=1)
