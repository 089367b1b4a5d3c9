"""`dgemma eval`: what a quantized file has lost."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import evaluation
from ..charts import Series, chart, check_name
from ..evaluation.evaluate import (
    LEVELS,
    Predictions,
    Question,
    answer_cases,
    ask,
    read_questions,
    score,
    summarize,
    summarize_scores,
    text_cases,
)
from ..files import write_file
from ..model import DiffusionGemma
from ..progress import progress_bar
from .common import add_common_options, print_json
from .shared import Subparsers, add_model_options, load_model

TEXT = Path(evaluation.__file__).with_name("evaluation.txt")  # unless -f says otherwise


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "eval",
        help="score a file's predictions, alone or beside a reference's, and its answers",
        description="Scores a file's predictions of a text on canvases at several levels of noise, "
        "or compares them with those of another file of the model (with --reference), and counts "
        "exact answers (with --questions).",
    )
    parser.add_argument(
        "--reference", metavar="R", type=Path, help="file to compare with: of more bits"
    )
    parser.add_argument(
        "-f",
        "--file",
        metavar="TEXT",
        type=Path,
        help="text whose pieces are the canvases (default: the reference's answers to the "
        "questions, or else a text of ours)",
    )
    parser.add_argument(
        "--questions",
        metavar="F",
        type=Path,
        help='JSON Lines of {"prompt", "answer", "kind"}, such as models/tiny/questions.jsonl',
    )
    parser.add_argument(
        "--cases",
        metavar="N",
        type=int,
        default=8,
        help="canvases to compare, each at every level of noise (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=int,
        default=64,
        help="tokens of the text before each canvas (default: %(default)s)",
    )
    parser.add_argument("--plot", metavar="F", type=Path, help="draw divergence by noise, as SVG")
    add_common_options(parser, "seed", "json")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the reference, then the model, and prints."""
    if args.cases < 1 or args.prompt_tokens < 1:
        raise ValueError("--cases and --prompt-tokens must be at least 1")
    if args.plot is not None and args.reference is None:
        raise ValueError("--plot draws the divergence from a --reference")
    if args.plot is not None:
        check_name(args.plot)
    questions = read_questions(args.questions) if args.questions else []
    began = time.perf_counter()
    found: dict[str, Any] = {}
    if args.reference is None:
        with load_model(args) as llm:
            found.update(_about(llm))
            if args.file is not None or not questions:
                found.update(_scores(llm, args))
            if questions:
                found["questions"] = _answers(llm, questions, args)
    else:
        with _reference(args, questions) as predicted, load_model(args) as llm:
            found.update(_about(llm), reference=args.reference.name, canvases=len(predicted.cases))
            with _bar("comparing", len(predicted.cases) * len(LEVELS)) as progress:
                compared = predicted.compare(llm, progress)
            found["levels"] = [
                {"noise": level, **part.summary()}
                for level, part in zip(LEVELS, compared, strict=True)
            ]
            found["all"] = summarize(compared)
            if questions:
                found["questions"] = _answers(llm, questions, args)
    found["seconds"] = time.perf_counter() - began
    if args.plot is not None:
        write_file(args.plot, _plot(found))
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def _about(llm: DiffusionGemma) -> dict[str, Any]:
    return {"model": os.path.basename(llm.model_path), "backend": llm.info.backend_name}


def _scores(llm: DiffusionGemma, args: argparse.Namespace) -> dict[str, Any]:
    """How well the file foretells a text by itself, by noise."""
    text = (args.file or TEXT).read_text(encoding="utf-8")
    cases = text_cases(llm, text, args.prompt_tokens, args.cases)
    with _bar("scoring", len(cases) * len(LEVELS)) as progress:
        found = score(llm, cases, progress)
    rows = [{"noise": n, **part.summary()} for n, part in zip(LEVELS, found, strict=True)]
    return {"canvases": len(cases), "scores": rows, "score": summarize_scores(found)}


def _answers(
    llm: DiffusionGemma, questions: list[Question], args: argparse.Namespace
) -> dict[str, Any]:
    with _bar("asking", len(questions)) as progress:
        return ask(llm, questions, args.seed, progress)


@contextlib.contextmanager
def _reference(args: argparse.Namespace, questions: list[Question]) -> Iterator[Predictions]:
    """What the reference predicts. Its weights are let go before the other model is loaded."""
    named = argparse.Namespace(**{**vars(args), "model": str(args.reference)})
    with contextlib.ExitStack() as stack:
        with load_model(named) as llm:
            if questions and args.file is None:
                cases = answer_cases(llm, questions, args.cases, args.seed)
            else:
                text = (args.file or TEXT).read_text(encoding="utf-8")
                cases = text_cases(llm, text, args.prompt_tokens, args.cases)
            predicted = stack.enter_context(Predictions(llm, cases))
            with _bar("reference", len(cases) * len(LEVELS)) as progress:
                predicted.record(llm, progress)
        yield predicted


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    with progress_bar(what, total, unit="it") as bar:
        yield bar.update


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['model']}, {found['backend']}"]
    if "levels" in found:
        lines += [
            f"divergence from {found['reference']} in nats, over {found['canvases']} canvases",
            f"  {'noise':>8} {'mean':>9} {'median':>9} {'99 %':>9} {'same choice':>12} "
            f"{'loss':>8} {'reference':>10}",
        ]
        for row in [*found["levels"], {"noise": None, **found["all"]}]:
            noise = "all" if row["noise"] is None else f"{100 * row['noise']:.0f} %"
            lines.append(
                f"  {noise:>8} {row['kl_mean']:>9.5f} {row['kl_median']:>9.5f} "
                f"{row['kl_p99']:>9.5f} {100 * row['same_first_choice']:>10.2f} % "
                f"{row['loss']:>8.4f} {row['reference_loss']:>10.4f}"
            )
    if "scores" in found:
        lines += [
            f"predictions of the text, over {found['canvases']} canvases",
            f"  {'noise':>8} {'loss':>9} {'perplexity':>11} {'first choice':>13}",
        ]
        for row in [*found["scores"], {"noise": None, **found["score"]}]:
            noise = "all" if row["noise"] is None else f"{100 * row['noise']:.0f} %"
            lines.append(
                f"  {noise:>8} {row['loss']:>9.4f} {row['perplexity']:>11.2f} "
                f"{100 * row['first_choice']:>11.2f} %"
            )
    if "questions" in found:
        answers = found["questions"]
        lines.append(f"  {'questions':<14} {'':>5} {'exact':>8} {'steps per canvas':>17}")
        for kind, row in [*answers["kinds"].items(), ("all", answers)]:
            lines.append(
                f"  {kind:<14} {row['questions']:>5} {100 * row['accuracy']:>6.1f} % "
                f"{row['steps_per_canvas']:>17.2f}"
            )
    return lines


def _plot(found: dict[str, Any]) -> str:
    """Divergence by noise; a level without any cannot be drawn on a logarithmic axis."""
    series = [
        Series(
            name,
            [(100 * row["noise"], row[key]) for row in found["levels"] if row[key] > 0],
            joined=True,
        )
        for name, key in (("99 %", "kl_p99"), ("mean", "kl_mean"), ("median", "kl_median"))
    ]
    return chart(
        f"{found['model']} beside {found['reference']}",
        "replaced tokens of the canvas in percent",
        "divergence in nats",
        series,
    )
