"""`dgemma eval`: divergences beside NumPy's, canvases, answers, and what cannot be compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import dgemma.evaluation
from dgemma.cli import main
from dgemma.errors import ModelFileError
from dgemma.evaluation import (
    LEVELS,
    Case,
    Comparison,
    Predictions,
    Question,
    answer_cases,
    ask,
    noisy_canvases,
    predictions,
    read_questions,
    summarize,
    text_cases,
)
from support import engine

TEXT = "Once there was a small owl that lived near the lake. One day it saw a red boat. " * 8
TURN = "<bos><|turn>user\n{}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"


@pytest.fixture(scope="module")
def q4_0(tiny_file: Callable[[str], Path]) -> Path:
    return tiny_file("q4_0")


def run(capsys: Any, *arguments: object) -> dict[str, Any]:
    command = ["eval", "--json", "--backend", "cpu", "-c", 512, *arguments]
    assert main([str(argument) for argument in command]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_divergence_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    part = Comparison()
    rows = np.log(np.array([p, p], np.float32)) + 7  # logits are known up to a constant
    part.add(rows, np.log(np.array([q, p], np.float32)) - 3, np.array([0, 2], np.int32))
    found = part.summary()
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert found["kl_max"] == pytest.approx(expected, rel=1e-5)
    assert found["kl_mean"] == pytest.approx(expected / 2, rel=1e-5)
    assert found["kl_median"] == pytest.approx(expected / 2, rel=1e-5)
    assert found["same_first_choice"] == 0.5
    assert found["reference_loss"] == pytest.approx((np.log(2) + np.log(4)) / 2, rel=1e-5)
    assert found["loss"] == pytest.approx(np.log(4), rel=1e-5)
    assert found["positions"] == 2
    assert summarize([part, part])["kl_mean"] == pytest.approx(expected / 2, rel=1e-5)


def test_noise() -> None:
    case = Case([2], np.full(4000, 7, np.int32))
    canvases = noisy_canvases(case, 1000, seed=5)
    kept = [canvas == 7 for canvas in canvases]
    for level, same in zip(LEVELS, kept, strict=True):
        assert same.mean() == pytest.approx(1 - level, abs=0.03)
    for less, more in zip(kept[1:], kept[:-1], strict=True):
        # what is kept stays kept, but for a fresh token that happens to be the right one
        assert (more & ~less).mean() < 0.005
    again = noisy_canvases(case, 1000, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(canvases, again, strict=True))
    assert not np.array_equal(canvases[0], noisy_canvases(case, 1000, seed=6)[0])


def test_each_level_is_conditioned_on_the_last() -> None:
    """With a session that returns what it was given, the chain can be read off."""
    seen: list[Any] = []

    class Recorder:
        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def truncate(self, n: int) -> None:
            seen.append(("truncate", n))

        def prefill(self, prompt: list[int]) -> None:
            seen.append(("prefill", prompt))

        def canvas_logits(self, canvas: Any, previous: Any) -> Any:
            seen.append(previous)
            return np.full((3, 4), float(len(seen)), np.float32)

    sampling = SimpleNamespace(t_min=0.4, t_max=0.8)
    info = SimpleNamespace(sampling=sampling, n_vocab=4)
    llm: Any = SimpleNamespace(session=Recorder, info=info)
    cases = [Case([1, 2], np.zeros(3, np.int32)), Case([3], np.zeros(3, np.int32))]
    found = list(predictions(llm, cases))
    assert [(case.prompt, level) for case, level, _ in found] == [
        (case.prompt, level) for case in cases for level in range(len(LEVELS))
    ]
    assert seen[:3] == [("truncate", 0), ("prefill", [1, 2]), None]
    for level in range(1, len(LEVELS)):
        temperature = 0.4 + 0.4 * LEVELS[level - 1]
        np.testing.assert_allclose(seen[2 + level], (2.0 + level) / temperature, rtol=1e-6)
    assert seen[2 + len(LEVELS)] == ("truncate", 0)
    assert seen[4 + len(LEVELS)] is None

    Recorder.canvas_logits = lambda *_: np.array([[0.0, np.nan]])  # type: ignore[method-assign]
    llm.model_path = "broken.gguf"
    with pytest.raises(ModelFileError, match=r"broken\.gguf: the logits are not finite"):
        list(predictions(llm, cases))


def test_command(q4_0: Path, tiny_gguf: Path, tmp_path: Path, capsys: Any) -> None:
    text, plot = tmp_path / "text.txt", tmp_path / "plot.svg"
    text.write_text(TEXT)
    options = ("--reference", tiny_gguf, "-f", text, "--prompt-tokens", 20, "--cases", 2)
    found = run(capsys, "-m", q4_0, *options, "--plot", plot)
    assert [row["noise"] for row in found["levels"]] == list(LEVELS)
    assert found["canvases"] == 2
    assert found["all"]["positions"] == 2 * 32 * len(LEVELS)
    assert 1e-5 < found["all"]["kl_mean"] < 1
    assert found["all"]["kl_median"] < found["all"]["kl_p99"] <= found["all"]["kl_max"]
    assert 0.8 < found["all"]["same_first_choice"] < 1
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")

    again = run(capsys, "-m", q4_0, *options, "--threads", 2)
    assert again["levels"] == found["levels"]
    same = run(capsys, "-m", tiny_gguf, *options)["all"]
    assert same["kl_max"] == 0
    assert same["same_first_choice"] == 1
    assert same["loss"] == same["reference_loss"]

    # without -f and questions there is a text of ours; the table says the same as the JSON
    command = ["eval", "-m", q4_0, "--reference", tiny_gguf, "--cases", 1, "-c", 512]
    assert main([str(word) for word in command]) == 0
    table = capsys.readouterr().out
    assert f"divergence from {tiny_gguf.name}" in table
    assert len(table.splitlines()) == 3 + len(LEVELS) + 1


def test_many_logits_wait_in_a_file(
    q4_0: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared() -> list[dict[str, float]]:
        with engine.open_model(tiny_gguf) as llm:
            predicted = Predictions(llm, text_cases(llm, TEXT, 16, 2))
            predicted.record(llm)
        with predicted, engine.open_model(q4_0) as llm:
            return [part.summary() for part in predicted.compare(llm)]

    in_memory = compared()
    monkeypatch.setattr(dgemma.evaluation.evaluate, "IN_MEMORY", 1000)
    assert compared() == in_memory
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="TMPDIR"):
        compared()


def test_questions(tiny_gguf: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        ("capital", "What is the capital of France?", "The capital of France is Paris.<turn|>"),
        ("capital", "What is the capital of Spain?", "The capital of Spain is Paris.<turn|>"),
        ("reverse", "Reverse the list: fox lamp river", "river lamp fox<turn|>"),
    ]
    lines = (json.dumps({"kind": k, "prompt": TURN.format(q), "answer": a}) for k, q, a in rows)
    path.write_text("\n".join(lines) + "\n")
    found = run(capsys, "-m", tiny_gguf, "--questions", path)["questions"]
    assert found["questions"] == 3
    assert found["right"] == 2
    assert found["kinds"]["capital"]["accuracy"] == 0.5
    assert found["kinds"]["reverse"]["accuracy"] == 1
    assert found["steps_per_canvas"] == found["steps"] / found["canvases"]
    assert 2 <= found["steps_per_canvas"] <= 48

    with engine.open_model(tiny_gguf) as llm:
        questions = read_questions(path)
        first = llm.generate(llm.tokenizer.encode(questions[0].prompt), seed=3)
        answered = ask(llm, questions[:1], seed=3)
        assert answered["steps"] == sum(first.stats.steps)
        cases = answer_cases(llm, questions, 2)
        assert [case.prompt for case in cases] == [
            llm.tokenizer.encode(questions[i].prompt) for i in (0, 1)
        ]
        assert llm.tokenizer.decode(cases[0].canvas.tolist()).startswith("The capital of France")
    # With a reference, its answers are the canvases.
    both = run(capsys, "-m", tiny_gguf, "--reference", tiny_gguf, "--questions", path)
    assert both["canvases"] == 3
    assert both["questions"]["right"] == 2


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", '{"prompt": "x"}', '{"prompt": "x", "answer": 3}']
)
def test_bad_questions(tmp_path: Path, text: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"questions\.jsonl"):
        read_questions(path)


def test_a_file_is_scored_by_itself(tiny_gguf: Path, capsys: Any) -> None:
    """The same losses as beside a reference, which here is the file itself."""
    command = ["eval", "-m", str(tiny_gguf), "--cases", "2", "--json"]
    assert main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*command, "--reference", str(tiny_gguf)]) == 0
    beside = json.loads(capsys.readouterr().out)
    assert alone["canvases"] == beside["canvases"] == 2
    for own, both in zip(alone["scores"], beside["levels"], strict=True):
        assert own["noise"] == both["noise"]
        assert own["loss"] == pytest.approx(both["loss"], rel=1e-9)
        assert own["perplexity"] == pytest.approx(np.exp(own["loss"]), rel=1e-9)
        assert 0 <= own["first_choice"] <= 1
    assert alone["scores"][-1]["loss"] < alone["scores"][0]["loss"]  # less noise, surer
    assert alone["score"]["positions"] == 2 * 5 * 32
    assert main(command[:-1]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_what_cannot_be_compared(
    gguf_file: Callable[..., Path], tiny_gguf: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "short.txt").write_text("a word")
    other = gguf_file("small")
    for options, match in (
        (["-m", tiny_gguf, "--plot", "x"], "--plot draws the divergence from a --reference"),
        (["-m", tiny_gguf, "--reference", other, "--cases", 1], "not the same model"),
        (["-m", tiny_gguf, "--reference", tiny_gguf, "--cases", 0], "at least 1"),
        (["-m", tiny_gguf, "--reference", tiny_gguf, "-f", tmp_path / "short.txt"], "shorter"),
        (["-m", tiny_gguf, "--questions", tmp_path / "short.txt", "--plot", "x"], "--reference"),
        (["-m", tiny_gguf, "--questions", tmp_path / "none"], "none"),
    ):
        assert main(["eval", *map(str, options)]) == 1
        assert match in capsys.readouterr().err


def test_the_committed_questions(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those that models/eval_tiny.py asks, and their answers fit the tokenizer."""
    monkeypatch.syspath_prepend(str(tiny.parent))
    import eval_tiny

    committed = read_questions(tiny / "questions.jsonl")
    made = [Question(*question) for question in eval_tiny.questions(60)]
    assert committed == made
    for name in ("eval_tiny", "tiny_data", "tiny_words"):
        sys.modules.pop(name)
