"""Quantized files: the engine against the same file decoded by the `gguf` package."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from dgemma_convert.policy import MIXES
from support.checkpoints import SPECS
from support.engine import conversation, open_model, random_tokens
from support.reference import load_gguf_as_reference, relative_rms

# Files of floats are computed with float activations; the others with 8-bit ones.
FLOAT_TYPES = ["f32", "f16", "bf16"]
BLOCK_TYPES = sorted(set(MIXES) - {"auto", *FLOAT_TYPES})
FLOAT_LIMIT, BLOCK_LIMIT = 1e-3, 2e-2


@pytest.fixture(scope="module")
def judged(gguf_file, checkpoint):
    """Logits of a converted file, by the engine and by the reference."""

    @functools.cache
    def both(name: str, outtype: str):
        path = gguf_file(name, outtype)
        tokens, canvases = random_tokens(name, 50, n_canvases=1, seed=8)
        expected = conversation(load_gguf_as_reference(path, checkpoint(name)), tokens, canvases)
        with open_model(path) as llm, llm.session() as session:
            return conversation(session, tokens, canvases), expected

    return both


@pytest.mark.parametrize("outtype", FLOAT_TYPES)
@pytest.mark.parametrize("name", SPECS)
def test_files_of_floats(judged, name, outtype):
    assert relative_rms(*judged(name, outtype)) <= FLOAT_LIMIT


@pytest.mark.parametrize("outtype", BLOCK_TYPES)
@pytest.mark.parametrize("name", ["calm small", "calm wide", "calm narrow"])
def test_files_of_blocks(judged, name, outtype):
    assert relative_rms(*judged(name, outtype)) <= BLOCK_LIMIT


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "nvfp4"])
@pytest.mark.parametrize("name", SPECS)
def test_experts_are_chosen_alike(judged, name, outtype):
    """Networks that amplify errors, and may exchange an expert: most positions stay close."""
    actual, expected = judged(name, outtype)
    errors = np.sqrt(((actual - expected) ** 2).mean(-1) / (expected**2).mean())
    assert np.quantile(errors, 0.25) <= 3 * BLOCK_LIMIT


@pytest.mark.parametrize("outtype", FLOAT_TYPES + BLOCK_TYPES)
def test_files_hold_the_type_they_are_named_for(gguf_file, outtype):
    """Where every width is a multiple of 256, the experts have the type that was asked for."""
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(gguf_file("wide", outtype)).tensors}
    kind = types["blk.0.ffn_down_exps.weight"].name
    named = outtype.upper()
    if named not in gguf.GGMLQuantizationType.__members__:  # a size of mix, as in Q4_K_M
        named = re.sub("_[SML]$", "", named)
    assert kind == named
    norms = [kind for name, kind in types.items() if "norm" in name or "ffn_gate_inp" in name]
    assert set(norms) == {gguf.GGMLQuantizationType.F32}


@pytest.mark.parametrize("outtype", ["q4_0", "nvfp4"])
def test_more_bits_mean_less_error(gguf_file, reference, outtype):
    """Against the unquantized checkpoint: eight bits are close, four are further away."""
    name = "wide"
    tokens, canvases = random_tokens(name, 20, n_canvases=1)
    expected = conversation(reference(name), tokens, canvases)
    errors = {}
    for kind in ("q8_0", outtype):
        with open_model(gguf_file(name, kind)) as llm, llm.session() as session:
            errors[kind] = relative_rms(conversation(session, tokens, canvases), expected)
    assert errors["q8_0"] < errors[outtype]
    assert errors["q8_0"] < 0.1


# Relative error that keys and values of a type may cause.
CACHE_LIMITS = {"f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2}


@pytest.mark.parametrize("cache", CACHE_LIMITS)
def test_caches_of_other_types(gguf_file, reference, cache):
    name = "calm wide"
    tokens, canvases = random_tokens(name, 40, n_canvases=2)
    expected = conversation(reference(name), tokens, canvases)
    with open_model(gguf_file(name), type_k=cache, type_v=cache) as llm, llm.session() as session:
        actual = conversation(session, tokens, canvases)
    assert 1e-6 < relative_rms(actual, expected) <= CACHE_LIMITS[cache]


@pytest.mark.parametrize("outtype", ["f32", "q4_0", "nvfp4"])
def test_threads_do_not_change_quantized_results(gguf_file, outtype):
    tokens, canvases = random_tokens("wide", 30)
    results = []
    for n_threads in (1, 2):
        path = gguf_file("wide", outtype)
        with open_model(path, n_threads=n_threads) as llm, llm.session() as session:
            results.append(conversation(session, tokens, canvases))
    assert np.array_equal(*results)


def plant_scales(path: Path, code: int) -> None:
    """Every third scale of every NVFP4 tensor becomes `code`."""
    content = np.memmap(path, np.uint8, "r+")
    n_tensors = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type.name == "NVFP4":
            end = tensor.data_offset + tensor.n_bytes
            blocks = content[tensor.data_offset : end].reshape(-1, 36)
            blocks[::3, 0] = blocks[1::3, 3] = blocks[2::3, 2] = code
            n_tensors += 1
    content.flush()
    assert n_tensors > 5


@pytest.mark.parametrize("backend", ["cpu", "cuda", "cuda with FP4"])
def test_scales_that_are_no_numbers_are_zero_everywhere(
    request, gguf_file, tmp_path, monkeypatch, backend
):
    """0x7f, and 0xff with a sign, which NVFP4's scales do not have."""
    monkeypatch.setenv("DGEMMA_EMULATION_FP4", str(int(backend.endswith("FP4"))))
    open_it = open_model if backend == "cpu" else request.getfixturevalue("cuda")
    tokens, canvases = random_tokens("odd", 9, n_canvases=1, seed=8)
    found = []
    for code in (0, 0x7F, 0xFF):
        path = tmp_path / f"{code}.gguf"
        path.write_bytes(gguf_file("odd", "nvfp4").read_bytes())
        plant_scales(path, code)
        with open_it(path) as llm, llm.session() as session:
            found.append(conversation(session, tokens, canvases))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
    assert np.isfinite(found[0]).all()
