"""Files between this project and others: the `gguf` package, published files, and llama.cpp.

`make test-interchange` builds llama-cpp-python first, which the last tests need.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import dgemma
from dgemma import _native
from dgemma_convert import convert
from support.checkpoints import CALM, Spec, make_checkpoint
from support.engine import conversation, open_model, random_tokens
from support.gemma4_tokenizer import write_tokenizer
from support.reference import load_gguf_as_reference, relative_rms

Type = gguf.GGMLQuantizationType
SPECIAL_TEXTS = (
    "<|turn>user\nWhat is 2 + 2?<turn|>\n<|turn>model\n",
    '<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>',
    "<bos>twice <bos>\n\n\n\ttabs\t\tand   spaces",
    "日本語とاللغة العربية и русский, 한국어 — “quotes” … 🧑‍🚀👩🏽‍🔬",
    "def f(x: int) -> int:\n    return x ** 2  # ²\n" * 3,
    "\u0000\u0007\ufffd\U0010ffff end",
)


@pytest.fixture(scope="module")
def vocabulary(gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted file whose checkpoint has the tokenizer of the released model."""
    folder = tmp_path_factory.mktemp("vocabulary")
    spec = dataclasses.replace(CALM["calm small"], vocab=262144, hidden=32, layers="f", heads=1)
    make_checkpoint(folder, spec)
    with _native.File(gemma4 / "vocab.gguf") as file:
        write_tokenizer(folder, dict(file.keys.items()))
    convert(folder, folder / "model.gguf", "bf16", progress=False)
    return folder / "model.gguf"


# ---- The gguf package ----------------------------------------------------------------------------


@pytest.mark.parametrize("outtype", ["f32", "q4_k_m", "nvfp4"])
def test_the_dumper_of_gguf_shows_all(
    gguf_file: Callable[..., Path], checkpoint: Callable[[str], Path], outtype: str
) -> None:
    path = gguf_file("wide", outtype)
    words = [sys.executable, "-m", "gguf.scripts.gguf_dump", str(path)]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    tensors = gguf.GGUFReader(path).tensors
    with _native.File(path) as file:
        assert [t.name for t in tensors] == [t.name for t in file.tensors]
        assert all(f"| {name} = " in result.stdout for name in file.keys)
    assert all(result.stdout.count(f"| {t.name}\n") == 1 for t in tensors)


@pytest.mark.parametrize("outtype", ["f32", "bf16", "iq4_xs_l", "q4_k_m", "q2_k", "nvfp4", "iq2_s"])
def test_a_file_survives_the_writer_of_gguf(
    gguf_file: Callable[..., Path], tmp_path: Path, outtype: str
) -> None:
    """Read by GGUFReader, written by GGUFWriter: the same keys, tensors and logits."""
    ours, again = gguf_file("wide", outtype), tmp_path / "again.gguf"
    reader = gguf.GGUFReader(ours)
    writer = gguf.GGUFWriter(again, "diffusion-gemma")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with _native.File(ours) as a, _native.File(again) as b:
        assert dict(b.keys.items()) == dict(a.keys.items())
        assert all(b.keys.type_of(name) == a.keys.type_of(name) for name in a.keys)
        for one, other in zip(a.tensors, b.tensors, strict=True):
            assert (one.name, one.shape, one.type) == (other.name, other.shape, other.type)
            assert one.data.tobytes() == other.data.tobytes()
    prompt, canvases = random_tokens("wide", 20, 1)
    found = []
    for path in (ours, again):
        with open_model(path) as llm, llm.session() as session:
            found.append(conversation(session, prompt, canvases))
    np.testing.assert_array_equal(*found)


# ---- Published files -----------------------------------------------------------------------------

# Rows of feed-forward networks that are not whole blocks of 256, as the released ones.
PUBLISHED = dataclasses.replace(CALM["calm wide"], name="published", mlp=288, expert_mlp=96)


def published_type(name: str, layer: int) -> Type:
    """What llama.cpp's Q4_K_M makes of a tensor, with its fall-backs for such rows."""
    more_bits = layer % 2 == 0
    if name == "token_embd.weight":
        return Type.Q6_K
    if "ffn_down" in name or name == "self_cond_down.weight":
        return Type.Q8_0 if more_bits else Type.Q5_0  # for Q6_K and Q4_K
    if "attn_v" in name:
        return Type.Q6_K if more_bits else Type.Q4_K
    return Type.Q4_K


def write_published(exact: Path, path: Path, *, fused: bool) -> set[str]:
    """The model of a float32 file, laid out and typed as a published Q4_K_M; returns its types."""
    ours_alone = ("diffusion.eb_", "tokenizer.ggml.eos_token_ids", "general.")
    reader = gguf.GGUFReader(exact)
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    for key, field in reader.fields.items():
        if not key.startswith((*ours_alone, "GGUF.")):
            kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, sub)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    used = set()

    def add(name: str, values: np.ndarray, layer: int) -> None:
        is_weight = values.ndim > 1 and "ffn_gate_inp" not in name
        kind = published_type(name, layer) if is_weight else Type.F32
        used.add(kind.name)
        if kind is Type.F32:
            writer.add_tensor(name, np.ascontiguousarray(values))
            return
        flat = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
        data, _ = _native.quantize(flat, "f32", kind.name.lower(), *flat.shape)
        writer.add_tensor(name, data.reshape(*values.shape[:-1], -1), raw_dtype=kind)

    for tensor in reader.tensors:
        name, values = tensor.name, np.array(tensor.data)
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        if "ffn_gate_up_exps" in name and not fused:
            half = values.shape[1] // 2
            add(name.replace("gate_up", "gate"), values[:, :half], layer)
            add(name.replace("gate_up", "up"), values[:, half:], layer)
        else:
            add(name, values, layer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return used


@pytest.mark.parametrize("fused", [True, False])
def test_a_published_q4_k_m_runs(tmp_path: Path, fused: bool) -> None:
    spec: Spec = PUBLISHED
    source = make_checkpoint(tmp_path / "source", spec)
    convert(source, tmp_path / "exact.gguf", "f32", progress=False)
    path = tmp_path / "published.gguf"
    used = write_published(tmp_path / "exact.gguf", path, fused=fused)
    assert used == {"Q4_K", "Q6_K", "Q5_0", "Q8_0", "F32"}
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, spec.vocab, 40).tolist()
    canvases = rng.integers(0, spec.vocab, (1, spec.canvas)).tolist()
    expected = conversation(load_gguf_as_reference(path, source), prompt, canvases)
    with open_model(path) as llm:
        with llm.session() as session:
            assert relative_rms(conversation(session, prompt, canvases), expected) <= 2e-2
        # Published files name one end token and no sampler: the others go by name, and defaults.
        assert llm.generate("a", max_tokens=spec.canvas, seed=0).finish_reason in ("stop", "length")


# ---- The vocabulary ------------------------------------------------------------------------------


def test_the_released_vocabulary_becomes_the_published_keys(vocabulary: Path, gemma4: Path) -> None:
    with _native.File(vocabulary) as ours, _native.File(gemma4 / "vocab.gguf") as published:
        names = [name for name in published.keys if name.startswith("tokenizer.")]
        assert len(names) == 13
        for name in names:
            assert ours.keys[name] == published.keys[name], name
            assert ours.keys.type_of(name) == published.keys.type_of(name), name


# ---- llama.cpp -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """llama.cpp's tokenizer with the keys of our file.

    The released llama.cpp refuses the architecture diffusion-gemma before it looks at anything
    else, so the tokenizer's keys are copied as they are into a file of an architecture that it
    knows, without weights. Of those it reads nothing but the vocabulary (`vocab_only`).
    """
    llama_cpp = pytest.importorskip("llama_cpp", reason="make test-interchange builds it")
    path = tmp_path_factory.mktemp("llama") / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "gemma4")
    with _native.File(vocabulary) as file:
        for name, value in file.keys.items():
            if name.startswith("tokenizer."):
                kind, sub = map(gguf.GGUFValueType, file.keys.type_of(name))
                is_array = kind is gguf.GGUFValueType.ARRAY
                writer.add_key_value(name, value, kind, sub if is_array else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def test_llama_cpp_tokenizes_the_public_cases_alike(llama: Any, gemma4: Path) -> None:
    texts = (gemma4 / "vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (gemma4 / "vectors.out").read_text().splitlines()
    assert len(texts) == len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        found = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert found == [int(i) for i in line.split()], repr(text)


@pytest.mark.parametrize("special", [True, False])
def test_llama_cpp_tokenizes_other_texts_alike(llama: Any, vocabulary: Path, special: bool) -> None:
    with _native.File(vocabulary) as file:
        ours = dgemma.tokenizer.Tokenizer(file.keys)
    files = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    texts = [*SPECIAL_TEXTS, *(path.read_text() for path in files)]
    for text in texts:
        if not special:
            # It ends an answer, so llama.cpp takes it for a control token, whatever the file says.
            text = text.replace("<|tool_response>", "")
        expected = llama.tokenize(text.encode(), add_bos=False, special=special)
        assert ours.encode(text, special=special) == expected, repr(text[:80])
        assert ours.decode(expected, special=True) == text.replace("▁", " ")


def test_llama_cpp_reads_special_tokens_and_template(llama: Any, vocabulary: Path) -> None:
    with _native.File(vocabulary) as file:
        keys = file.keys
        assert llama.n_vocab() == len(keys["tokenizer.ggml.tokens"])
        assert llama.token_bos() == keys["tokenizer.ggml.bos_token_id"]
        assert llama.token_eos() == keys["tokenizer.ggml.eos_token_id"]
        assert llama.metadata["tokenizer.chat_template"] == keys["tokenizer.chat_template"]
