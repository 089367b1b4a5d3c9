"""Where randomness comes from: published generator, exact inverse transform, no hidden state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from support.checkpoints import SPECS
from support.engine import open_model, random_tokens, statistics
from support.philox import candidate_uniforms, initial_tokens, philox4x32, renoise_tokens

# Known answers of the generator's authors (Random123, kat_vectors, philox4x32 10).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert philox4x32(np.array(counter), key).tolist() == list(answer)


SEEDS = [0, 1, 12345, 2**32 + 1, 2**63 + 5, 2**64 - 1]


@pytest.mark.parametrize("name", ["small", "long"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("canvas", [0, 3])
def test_draws_are_the_published_ones(gguf_file, name, seed, canvas):
    """Candidates are the inverse transform of softmax(logits / T); other draws are exact."""
    spec = SPECS[name]
    shape = (spec.canvas, spec.vocab)
    with open_model(gguf_file(name)) as llm, llm.session() as session:
        session.prefill(random_tokens(name, 20)[0])
        first = initial_tokens(seed, canvas, *shape)
        logits = session.canvas_logits(first)
        # Everything accepted: the next canvas is the candidates. Flat, so that u decides.
        sampling = dataclasses.replace(
            llm.info.sampling, entropy_bound=1e9, t_min=2.0, t_max=2.0, max_denoising_steps=2
        )
        session.begin_canvas(sampling, seed=seed, canvas=canvas)
        step = session.step()
        assert step.n_accepted == spec.canvas
        np.testing.assert_array_equal(step.tokens, logits.argmax(-1))
        check_candidates(step.canvas, logits, 2.0, candidate_uniforms(seed, canvas, 1, spec.canvas))
        second = session.step()
        logits = session.canvas_logits(step.canvas, logits / np.float32(2.0))
        uniforms = candidate_uniforms(seed, canvas, 2, spec.canvas)
        check_candidates(second.canvas, logits, 2.0, uniforms)

        # Almost nothing accepted: the next canvas is fresh tokens.
        tight = dataclasses.replace(sampling, entropy_bound=1e-9)
        session.begin_canvas(tight, seed=seed, canvas=canvas)
        step = session.step()
        assert step.n_accepted == 1
        fresh = step.canvas == renoise_tokens(seed, canvas, 1, *shape)
        assert fresh.sum() >= spec.canvas - 1


def check_candidates(candidates, logits, temperature: float, uniforms) -> None:
    """Each candidate's share of the cumulated probabilities holds its uniform number."""
    p, _ = statistics(logits, temperature)
    above = np.cumsum(p, -1)
    rows = np.arange(len(candidates))
    upper = above[rows, candidates]
    lower = upper - p[rows, candidates]
    # float32 sums over a vocabulary: a draw this close to an edge may fall on either side
    slack = 2e-6
    assert np.all(lower - slack <= uniforms)
    assert np.all(uniforms < upper + slack)


def test_candidates_follow_the_distribution(gguf_file):
    """Thousands of draws from one distribution: frequencies within five standard errors."""
    spec = SPECS["odd"]
    n_seeds = 300
    start = np.zeros(spec.canvas, int)
    with open_model(gguf_file("odd")) as llm, llm.session() as session:
        session.prefill([5, 6, 7])
        p, _ = statistics(session.canvas_logits(start), 1.0)
        sampling = dataclasses.replace(
            llm.info.sampling, entropy_bound=1e9, t_min=1.0, t_max=1.0, max_denoising_steps=1
        )
        counts = np.zeros(spec.vocab)
        for seed in range(n_seeds):
            session.begin_canvas(sampling, seed=seed, start=start)
            counts += np.bincount(session.step().canvas, minlength=spec.vocab)
    expected = n_seeds * p.sum(0)
    spread = np.sqrt(n_seeds * (p * (1 - p)).sum(0))
    assert np.all(np.abs(counts - expected) < 5 * spread + 1)


@pytest.mark.parametrize("name", ["small", "wide", "narrow"])
def test_text_depends_on_the_seed_alone(gguf_file, name):
    """Same seed, same answer: with 1 and 2 threads, other chunks, and on every run."""
    spec = SPECS[name]
    prompt, _ = random_tokens(name, spec.window + 3)
    answers = []
    for options in ({"n_threads": 1}, {"n_threads": 2}, {"n_threads": 2, "n_batch": 256}):
        with open_model(gguf_file(name), **options) as llm:
            for _ in range(2):
                out = llm.generate(prompt, max_tokens=3 * spec.canvas, seed=11)
                answers.append((list(out.tokens), list(out.stats.steps)))
            other = llm.generate(prompt, max_tokens=3 * spec.canvas, seed=12)
    assert all(answer == answers[0] for answer in answers)
    assert list(other.tokens) != answers[0][0]


def test_canvases_of_an_answer_draw_differently(gguf_file):
    """The number of the canvas is part of the counter."""
    with open_model(gguf_file("small")) as llm, llm.session() as session:
        session.prefill([5, 6, 7])
        canvases = []
        for canvas in range(3):
            session.begin_canvas(seed=1, canvas=canvas)
            canvases.append(session.step().canvas.tolist())
    assert len({tuple(canvas) for canvas in canvases}) == 3
