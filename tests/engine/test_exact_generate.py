"""Whole answers: `generate` with the draws of `transformers`' own `generate` gives its answer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma_convert import convert
from support.checkpoints import SPECS
from support.engine import open_model
from support.reference import Recording, Reference, record_generate

# Ways to run the sampler, so that canvases settle early, late and not at all.
OPTIONS: dict[str, dict[str, Any]] = {
    "as the file says": {},
    "loose": {"confidence_threshold": 0.2, "entropy_bound": 1.0, "max_denoising_steps": 12},
    "twice stable": {"confidence_threshold": 1.5, "entropy_bound": 3.0, "stability_threshold": 2},
    "cold": {"confidence_threshold": 2.0, "entropy_bound": 20.0, "t_min": 0.05, "t_max": 0.1},
    "no history": {"confidence_threshold": 4.0, "stability_threshold": 0},
    "one step": {"max_denoising_steps": 1},
}
SEEDS = range(3)
N_CANVASES = 4


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    options: str
    seed: int

    def prompt(self) -> list[int]:
        spec = SPECS[self.name]
        n_tokens = (3, spec.window, 2 * spec.window + 1)[self.seed]
        return np.random.default_rng(self.seed).integers(0, spec.vocab, n_tokens).tolist()


CASES = [Case(name, options, seed) for name in SPECS for options in OPTIONS for seed in SEEDS]


@pytest.fixture(scope="module")
def recorded(reference):
    """The reference's run of a case."""

    @functools.cache
    def run(case: Case) -> Recording:
        return record_generate(
            reference(case.name),
            case.prompt(),
            case.seed,
            max_new_tokens=N_CANVASES * SPECS[case.name].canvas,
            **OPTIONS[case.options],
        )

    return run


@pytest.fixture(scope="module")
def models(gguf_file):
    """Open models by the names of their specs."""
    opened = {name: open_model(gguf_file(name)) for name in SPECS}
    yield opened
    for model in opened.values():
        model.close()


def noise_of(recording: Recording) -> dgemma.ReplayedDraws:
    draws = zip(recording.initial, recording.candidates, recording.renoise, strict=True)
    return dgemma.ReplayedDraws([dgemma.CanvasNoise(*canvas) for canvas in draws])


def without_end(recording: Recording) -> list[int]:
    """What `generate` returns of an answer: the end token is left out."""
    return recording.tokens[:-1] if recording.ended else recording.tokens


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.options}-{c.seed}")
def test_the_answer_is_that_of_transformers(recorded, models, case):
    expected = recorded(case)
    out = models[case.name].generate(
        case.prompt(),
        max_tokens=N_CANVASES * SPECS[case.name].canvas,
        noise=noise_of(expected),
        **OPTIONS[case.options],
    )
    assert list(out.tokens) == without_end(expected)
    assert list(out.stats.steps) == expected.steps
    assert out.finish_reason == ("stop" if expected.ended else "length")


def test_the_cases_cover_every_way_to_end(recorded):
    """Settled and out of steps, first and later canvases, ended by a token and by length."""
    seen = set()
    for case in CASES:
        recording = recorded(case)
        limit = OPTIONS[case.options].get("max_denoising_steps", 8)
        for steps in recording.steps:
            seen.add("settled" if steps < limit else "out of steps")
        n = len(recording.steps)
        seen.add(("ended" if recording.ended else "length", "first" if n == 1 else "later"))
        if recording.ended and len(recording.tokens) % SPECS[case.name].canvas == 1:
            seen.add("end token at the start of a canvas")
    assert seen >= {"settled", "out of steps"}
    assert seen >= {("ended", "first"), ("ended", "later"), ("length", "later")}
    distinct = {steps for case in CASES for steps in recorded(case).steps}
    assert len(distinct) >= 6


@pytest.mark.parametrize("name", ["odd", "long"])
def test_drafts_are_the_reference_s_own(recorded, models, name):
    """Step by step: every draft, and every working canvas that followed from it."""
    case = Case(name, "loose", 1)
    expected = recorded(case)
    noise = noise_of(expected)
    with models[name].session() as session:
        session.prefill(case.prompt())
        sampling = dataclasses.replace(models[name].info.sampling, **OPTIONS[case.options])
        for canvas, drafts in enumerate(expected.drafts):
            session.begin_canvas(sampling, canvas=canvas, noise=noise.canvases[canvas])
            steps = [session.step() for _ in drafts]
            assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
            np.testing.assert_array_equal([step.tokens for step in steps], drafts)
            session.prefill(steps[-1].tokens)


def test_an_answer_shorter_than_a_canvas_is_cut(recorded, models):
    """The reference rounds max_new_tokens up to whole canvases; users get what they asked for."""
    case = next(c for c in CASES if c.name == "small" and not recorded(c).ended)
    expected = recorded(case)
    for max_tokens in (1, SPECS["small"].canvas + 3):
        out = models["small"].generate(
            case.prompt(),
            max_tokens=max_tokens,
            noise=noise_of(expected),
            **OPTIONS[case.options],
        )
        assert list(out.tokens) == expected.tokens[:max_tokens]
        assert out.finish_reason == "length"


def test_too_few_replayed_draws_are_refused(recorded, models):
    case = next(c for c in CASES if c.name == "small" and recorded(c).steps[0] > 2)
    expected = recorded(case)
    short = dgemma.ReplayedDraws(
        [
            dgemma.CanvasNoise(
                expected.initial[0], expected.candidates[0][:2], expected.renoise[0][:2]
            )
        ]
    )
    with pytest.raises(ValueError, match="noise"):
        models["small"].generate(case.prompt(), max_tokens=5, noise=short, **OPTIONS[case.options])


QUESTIONS = ["What is the capital of France?", "Reverse the word planet.", "Count from 3 to 41."]


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_trained_model_answers_as_in_transformers(tiny, tmp_path, question):
    """Real text, sharp predictions: models/tiny with its own tokenizer and defaults."""
    path = tmp_path / "tiny-f32.gguf"
    convert(tiny, path, "f32", progress=False)
    judge = Reference.load(tiny)
    with open_model(path) as llm:
        prompt = llm.tokenize(
            f"<bos><|turn>user\n{question}<turn|>\n<|turn>model\n".encode(),
            add_bos=False,
            special=True,
        )
        expected = record_generate(judge, prompt, 0, max_new_tokens=2 * judge.canvas_length)
        out = llm.generate(prompt, max_tokens=2 * judge.canvas_length, noise=noise_of(expected))
    assert list(out.tokens) == without_end(expected)
    assert list(out.stats.steps) == expected.steps
