"""The denoising loop, replayed in NumPy from the engine's logits: it decides as model.md says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import dgemma
from support.checkpoints import SPECS
from support.engine import open_model, random_tokens, statistics
from support.philox import initial_tokens, renoise_tokens


@pytest.fixture(scope="module", params=["wide", "odd", "long"])
def prefilled(request, gguf_file):
    """A session with a prompt in it."""
    with open_model(gguf_file(request.param)) as llm, llm.session() as session:
        session.prefill(random_tokens(request.param, SPECS[request.param].window + 5)[0])
        yield llm, session


def denoise(session, sampling, **canvas) -> list:
    """All steps of a canvas."""
    session.begin_canvas(sampling, **canvas)
    steps = [session.step()]
    while not steps[-1].done:
        steps.append(session.step())
    return steps


def accepted_positions(entropies, bound: float) -> set[int]:
    """Positions in ascending order of entropy, while those before sum to at most the bound."""
    order = np.argsort(entropies, kind="stable")
    before = np.cumsum(entropies[order]) - entropies[order]
    return {int(i) for i in order[before <= bound]}


SAMPLINGS = {
    "file": {},
    "tight": {"entropy_bound": 1e-6, "max_denoising_steps": 5},
    "wide": {"entropy_bound": 30.0, "max_denoising_steps": 6, "t_min": 0.1, "t_max": 1.3},
    "everything": {"entropy_bound": 1e6, "max_denoising_steps": 6, "t_min": 0.9, "t_max": 0.9},
    "impatient": {"confidence_threshold": 3.0, "stability_threshold": 0},
    "patient": {"confidence_threshold": 3.0, "stability_threshold": 3, "max_denoising_steps": 20},
}


@pytest.mark.parametrize("options", SAMPLINGS)
def test_every_step_follows_from_its_logits(prefilled, options):
    llm, session = prefilled
    sampling = dataclasses.replace(llm.info.sampling, **SAMPLINGS[options])
    steps = denoise(session, sampling, seed=7)
    n_steps = sampling.max_denoising_steps
    assert [s.step for s in steps] == list(range(1, len(steps) + 1))
    previous, drafts = None, []
    n, n_vocab = llm.info.canvas_length, llm.info.n_vocab
    canvas = initial_tokens(7, 0, n, n_vocab)
    for step in steps:
        remaining = n_steps - step.step + 1
        temperature = sampling.t_min + (sampling.t_max - sampling.t_min) * remaining / n_steps
        assert step.temperature == pytest.approx(temperature, rel=1e-6)

        logits = session.canvas_logits(canvas, previous)
        z = logits / np.float32(temperature)
        p, entropies = statistics(logits, temperature)
        np.testing.assert_array_equal(step.tokens, logits.argmax(-1))
        np.testing.assert_allclose(step.entropies, entropies, rtol=1e-4, atol=2e-5)
        assert step.mean_entropy == pytest.approx(step.entropies.mean(), rel=1e-5, abs=1e-6)

        accepted = accepted_positions(step.entropies.astype(np.float64), sampling.entropy_bound)
        assert step.n_accepted == len(accepted)
        renoised = [i for i in range(n) if i not in accepted]
        expected = renoise_tokens(7, 0, step.step, n, n_vocab)
        np.testing.assert_array_equal(step.canvas[renoised], expected[renoised])
        assert all(p[i, step.canvas[i]] > 1e-7 for i in accepted), "an impossible token was drawn"

        drafts.append(step.tokens)
        history = drafts[-1 - sampling.stability_threshold : -1]
        stable = len(history) == sampling.stability_threshold and all(
            np.array_equal(draft, step.tokens) for draft in history
        )
        settled = stable and step.mean_entropy < sampling.confidence_threshold
        assert step.settled == settled
        assert step.done == (settled or step.step == n_steps)
        canvas, previous = step.canvas, z


def test_the_cases_settle_and_run_out(prefilled):
    """The loop above is exercised in both directions."""
    llm, session = prefilled
    outcomes = {}
    for name, options in SAMPLINGS.items():
        sampling = dataclasses.replace(llm.info.sampling, **options)
        outcomes[name] = denoise(session, sampling, seed=7)[-1].settled
    assert outcomes["impatient"]
    assert not all(outcomes.values())


def test_a_seed_gives_the_same_steps(prefilled):
    _, session = prefilled
    runs = [denoise(session, None, seed=seed) for seed in (3, 3, 4)]
    same, other = runs[0], runs[2]
    for a, b in zip(same, runs[1], strict=True):
        assert np.array_equal(a.canvas, b.canvas)
        assert np.array_equal(a.entropies, b.entropies)
    assert not np.array_equal(same[0].canvas, other[0].canvas)


def test_pinned_tokens_stay_and_count_for_nothing(prefilled):
    llm, session = prefilled
    n, n_vocab = llm.info.canvas_length, llm.info.n_vocab
    pinned = np.full(n, -1)
    pinned[::3] = np.arange(0, n, 3) % n_vocab
    free = pinned < 0
    for step in denoise(session, None, seed=1, pinned=pinned):
        assert np.array_equal(step.tokens[~free], pinned[~free])
        assert np.array_equal(step.canvas[~free], pinned[~free])
        assert not step.entropies[~free].any()
        assert step.mean_entropy == pytest.approx(step.entropies[free].mean(), rel=1e-5)
        assert step.n_accepted <= free.sum()


def test_a_given_start_replaces_the_random_canvas(prefilled):
    llm, session = prefilled
    start = np.arange(llm.info.canvas_length) % llm.info.n_vocab
    session.begin_canvas(seed=1, start=start)
    step = session.step()
    logits = session.canvas_logits(start)
    np.testing.assert_array_equal(step.tokens, logits.argmax(-1))


def test_a_step_without_a_canvas_is_refused(prefilled):
    _, session = prefilled
    denoise(session, None, seed=1)
    with pytest.raises(ValueError, match="no canvas"):
        session.step()


@pytest.mark.parametrize(
    "options",
    [
        {"max_denoising_steps": 0},
        {"t_min": 0.0},
        {"t_min": 0.9, "t_max": 0.5},
        {"t_max": float("nan")},
        {"entropy_bound": 0.0},
        {"entropy_bound": float("nan")},
        {"stability_threshold": -1},
        {"stability_threshold": 65},
        {"confidence_threshold": 0.0},
    ],
    ids=str,
)
def test_senseless_options_are_refused(prefilled, options):
    _, session = prefilled
    name = next(iter(options))
    with pytest.raises(ValueError, match=name):
        session.begin_canvas(dataclasses.replace(dgemma.Sampling(), **options))
