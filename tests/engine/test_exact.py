"""Canvas logits of a float32 file, float32 cache, against `transformers` in float32, eager."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from support.checkpoints import SPECS
from support.engine import conversation, open_model, random_tokens
from support.numpy_model import NumpyModel
from support.reference import read_gguf

# Two correct float32 implementations of these networks differ by about 1e-5.
TOLERANCE = 2e-4
# Where only the order of the engine's own sums differs.
OWN_TOLERANCE = 5e-5

PROMPTS: dict[str, Callable[[int], int]] = {
    "one token": lambda window: 1,
    "window - 1": lambda window: window - 1,
    "window": lambda window: window,
    "window + 1": lambda window: window + 1,
    "several windows": lambda window: 3 * window + 5,
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", SPECS)
def test_canvas_logits_are_those_of_transformers(gguf_file, reference, name, prompt):
    tokens, canvases = random_tokens(name, PROMPTS[prompt](SPECS[name].window))
    expected = conversation(reference(name), tokens, canvases)
    with open_model(gguf_file(name)) as llm, llm.session() as session:
        actual = conversation(session, tokens, canvases)
        assert session.n_past == len(tokens) + 3 * SPECS[name].canvas
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SPECS)
def test_chunks_and_threads_do_not_change_the_logits(gguf_file, reference, name):
    """Prompts encoded in chunks of any size, in one call or many, on one thread or two."""
    window = SPECS[name].window
    tokens, canvases = random_tokens(name, 2 * window + 9, seed=1)
    expected = conversation(reference(name), tokens, canvases)
    results = {}
    for n_batch, n_threads in ((1, 1), (3, 1), (3, 2), (window, 1), (256, 1), (256, 2)):
        options = {"n_batch": n_batch, "n_threads": n_threads}
        with open_model(gguf_file(name), **options) as llm, llm.session() as session:
            actual = results[n_batch, n_threads] = conversation(session, tokens, canvases)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(actual, results[1, 1], rtol=0, atol=OWN_TOLERANCE)
    for n_batch in (3, 256):
        assert np.array_equal(results[n_batch, 1], results[n_batch, 2]), "threads change results"
    with open_model(gguf_file(name)) as llm, llm.session() as session:
        for token in tokens[:7]:
            session.prefill([token])
        by_token = conversation(session, tokens[7:], canvases)
    np.testing.assert_allclose(by_token, results[1, 1], rtol=0, atol=OWN_TOLERANCE)


@pytest.mark.parametrize("name", SPECS)
def test_truncation_equals_never_having_seen(gguf_file, name):
    """Cut back and continued differently, a session is as good as a new one."""
    window = SPECS[name].window
    tokens, canvases = random_tokens(name, 2 * window + 9, seed=2)
    other, _ = random_tokens(name, window, seed=3)
    with open_model(gguf_file(name)) as llm:
        for kept in (len(tokens), len(tokens) - 2, len(tokens) - window, window + 1, 1, 0):
            with llm.session() as fresh:
                expected = conversation(fresh, tokens[:kept] + other, canvases)
            with llm.session() as session:
                session.prefill(tokens)
                n_past = session.truncate(kept)
                assert n_past in (0, kept)
                assert session.n_past == n_past
                assert session.tokens.tolist() == tokens[:n_past]
                actual = conversation(session, tokens[n_past:kept] + other, canvases)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=OWN_TOLERANCE)


def test_decoding_leaves_the_cache_alone(gguf_file):
    """The same canvas gives the same logits, bit for bit, whatever was decoded in between."""
    tokens, canvases = random_tokens("wide", 30)
    with open_model(gguf_file("wide")) as llm, llm.session() as session:
        session.prefill(tokens)
        first = session.canvas_logits(canvases[0])
        session.canvas_logits(canvases[1], first)
        assert np.array_equal(session.canvas_logits(canvases[0]), first)


def test_two_sessions_do_not_disturb_each_other(gguf_file):
    tokens, canvases = random_tokens("small", 30)
    other, _ = random_tokens("small", 11, seed=5)
    with open_model(gguf_file("small")) as llm, llm.session() as a, llm.session() as b:
        a.prefill(tokens)
        alone = a.canvas_logits(canvases[0])
        b.prefill(other)
        assert not np.array_equal(b.canvas_logits(canvases[0]), alone)
        assert np.array_equal(a.canvas_logits(canvases[0]), alone)


@pytest.mark.parametrize("name", ["small", "odd", "long"])
def test_the_model_page_is_right(gguf_file, reference, name):
    """docs/model.md, written out as NumPy in float64, agrees with the reference as well."""
    model = NumpyModel(*read_gguf(gguf_file(name)))
    tokens, canvases = random_tokens(name, SPECS[name].window + 3, n_canvases=2, seed=4)
    expected = conversation(reference(name), tokens, canvases)
    np.testing.assert_allclose(
        conversation(model, tokens, canvases), expected, rtol=0, atol=TOLERANCE
    )


MUTATIONS: dict[str, Callable[[dict, dict], None]] = {
    "window": lambda keys, w: add(keys, "attention.sliding_window", 1),
    "epsilon": lambda keys, w: add(keys, "attention.layer_norm_rms_epsilon", 1e-3),
    "soft-cap": lambda keys, w: add(keys, "final_logit_softcapping", 0.5),
    "top-k": lambda keys, w: add(keys, "expert_used_count", -1),
    "theta": lambda keys, w: add(keys, "rope.freq_base", 200.0),
    "sliding theta": lambda keys, w: add(keys, "rope.freq_base_swa", 10.0),
    "rotated share": lambda keys, w: w["rope_freqs.weight"].fill(1.0),
    "encoder scalar": lambda keys, w: copy(w, "layer_output_scale", "enc_layer_output_scale"),
    "decoder scalar": lambda keys, w: copy(w, "enc_layer_output_scale", "layer_output_scale"),
    "router scale": lambda keys, w: w["blk.0.ffn_gate_inp.scale"].fill(1.0),
    "expert scale": lambda keys, w: w["blk.0.ffn_down_exps.scale"].fill(1.0),
    "gate and up": lambda keys, w: swap_halves(w, "blk.1.ffn_gate_up_exps.weight"),
    "self-conditioning norm": lambda keys, w: w["self_cond_pre_norm.weight"].fill(1.0),
    "query norm": lambda keys, w: copy(w, "attn_k_norm", "attn_q_norm"),
    "expert norm": lambda keys, w: copy(w, "ffn_norm", "pre_ffw_norm_2"),
}


def add(keys: dict, name: str, amount: float) -> None:
    keys["diffusion-gemma." + name] += amount


def copy(w: dict, source: str, target: str) -> None:
    w[f"blk.0.{target}.weight"] = w[f"blk.0.{source}.weight"]


def swap_halves(w: dict, name: str) -> None:
    w[name] = np.roll(w[name], w[name].shape[1] // 2, axis=1)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_judge_notices(gguf_file, reference, mutation):
    """Each misreading of a file stands out by far: the comparisons above can fail."""
    keys, tensors = read_gguf(gguf_file("odd"))
    MUTATIONS[mutation](keys, tensors)
    model = NumpyModel(keys, tensors)
    tokens, canvases = random_tokens("odd", SPECS["odd"].window + 3, n_canvases=1)
    expected = conversation(reference("odd"), tokens, canvases)
    error = np.abs(conversation(model, tokens, canvases) - expected).max()
    assert error > 10 * TOLERANCE
