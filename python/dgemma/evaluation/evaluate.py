"""How good a file is: its predictions beside those of a reference, and answers to questions.

Predictions are compared on fixed canvases: clean ones of which a share of the tokens is replaced by
random tokens, from all of them to a few, as a canvas is from the first denoising step to the last.
Each is conditioned on the model's own prediction at the level before, as in denoising.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelFileError
from ..evaluation.calibration import text_chunks
from ..model import DiffusionGemma
from ..values import FloatArray, IdArray

LEVELS = (1.0, 0.75, 0.5, 0.25, 0.1)  # shares of the tokens that are replaced, most noise first
IN_MEMORY = 1 << 28  # bytes of logits that are kept there; more go to a temporary file
SLICE = 32  # rows of logits that are compared at a time, in float64
MAX_CANVASES = 8  # of an answer

Doubles = npt.NDArray[np.float64]
Progress = Callable[[int], object]  # called with how many canvases were just done


def _silent(_: int) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """A prompt and a clean canvas behind it."""

    prompt: list[int]
    canvas: IdArray


@dataclass(frozen=True)
class Question:
    """A prompt, with its control tokens spelled out, and the only right answer."""

    kind: str
    prompt: str
    answer: str


# ---- What to look at -----------------------------------------------------------------------------


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSON Lines file: objects with `prompt`, `answer` and, if wanted, `kind`."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(row.get("kind", "questions"), row["prompt"], row["answer"])
        except (ValueError, KeyError, TypeError, AttributeError):
            question = None
        if question is None or not all(isinstance(v, str) for v in vars(question).values()):
            raise ValueError(
                f'{path}, line {number}: expected {{"prompt": TEXT, "answer": TEXT, "kind": TEXT}}'
            )
        found.append(question)
    if not found:
        raise ValueError(f"{path}: has no questions")
    return found


def text_cases(llm: DiffusionGemma, text: str, n_prompt: int, n_cases: int) -> list[Case]:
    """Up to `n_cases` pieces of a text: `n_prompt` tokens, and the canvas that follows them."""
    size = n_prompt + llm.info.canvas_length
    pieces = [piece for piece in text_chunks(llm, text, size) if len(piece) == size][:n_cases]
    if not pieces:
        raise ValueError(f"the text is shorter than a prompt of {n_prompt} tokens and a canvas")
    return [Case(piece[:n_prompt], np.array(piece[n_prompt:], np.int32)) for piece in pieces]


def answer_cases(
    llm: DiffusionGemma, questions: Sequence[Question], n_cases: int, seed: int = 0
) -> list[Case]:
    """Up to `n_cases` questions, taken evenly, with the canvas that this model settles on."""
    n_cases = min(n_cases, len(questions))
    chosen = [questions[i * len(questions) // n_cases] for i in range(n_cases)]
    cases = []
    with llm.session() as session:
        for index, question in enumerate(chosen):
            prompt = llm.tokenizer.encode(question.prompt)
            session.truncate(0)
            session.prefill(prompt)
            session.begin_canvas(seed=seed + index)
            step = session.step()
            while not step.done:
                step = session.step()
            cases.append(Case(prompt, step.tokens))
    return cases


# ---- Predictions ---------------------------------------------------------------------------------


def noisy_canvases(case: Case, n_vocab: int, seed: int) -> list[IdArray]:
    """The case's canvas at each of LEVELS; what one level leaves alone, the next ones do too."""
    rng = np.random.default_rng(seed)
    order = rng.random(len(case.canvas))
    fresh = rng.integers(0, n_vocab, (len(LEVELS), len(case.canvas)), dtype=np.int32)
    return [
        np.where(order < level, tokens, case.canvas)
        for level, tokens in zip(LEVELS, fresh, strict=True)
    ]


def predictions(
    llm: DiffusionGemma, cases: Sequence[Case], seed: int = 0
) -> Iterator[tuple[Case, int, FloatArray]]:
    """For each case and the index of each level: logits (canvas, vocab) at temperature 1.

    ModelFileError where they are not finite.
    """
    sampling = llm.info.sampling
    with llm.session() as session:
        for index, case in enumerate(cases):
            session.truncate(0)
            session.prefill(case.prompt)
            previous = None
            canvases = noisy_canvases(case, llm.info.n_vocab, seed + index)
            for level, canvas in enumerate(canvases):
                logits = session.canvas_logits(canvas, previous)
                if not np.isfinite(logits).all():
                    raise ModelFileError(f"{llm.model_path}: the logits are not finite")
                yield case, level, logits
                hot = sampling.t_min + (sampling.t_max - sampling.t_min) * LEVELS[level]
                previous = logits / np.float32(hot)


@dataclass
class Score:
    """How well a model itself foretells clean canvases: of each position, -log p and a hit."""

    losses: list[Doubles] = field(default_factory=list)
    hits: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def add(self, logits: FloatArray, targets: IdArray) -> None:
        """Takes in logits (n, vocab) at n positions."""
        self.losses.append(-log_softmax(logits)[np.arange(len(targets)), targets])
        self.hits.append(logits.argmax(-1) == targets)

    def summary(self) -> dict[str, float]:
        """Figures for JSON: the loss in nats, its exponential, and the share of right choices."""
        return summarize_scores([self])


def summarize_scores(parts: Sequence[Score]) -> dict[str, float]:
    """Figures over the positions of all parts."""
    losses = np.concatenate([loss for part in parts for loss in part.losses])
    return {
        "loss": float(losses.mean()),
        "perplexity": float(np.exp(losses.mean())),
        "first_choice": float(np.concatenate([hit for part in parts for hit in part.hits]).mean()),
        "positions": len(losses),
    }


def score(
    llm: DiffusionGemma, cases: Sequence[Case], progress: Progress = _silent
) -> list[Score]:
    """Runs a model over all cases, without a reference: what was found at each of LEVELS."""
    found = [Score() for _ in LEVELS]
    for case, level, logits in predictions(llm, cases):
        for first in range(0, len(logits), SLICE):
            part = slice(first, first + SLICE)
            found[level].add(logits[part], case.canvas[part])
        progress(1)
    return found


class Predictions:
    """A model's logits, one canvas after the other; many of them wait in a temporary file."""

    def __init__(self, llm: DiffusionGemma, cases: Sequence[Case]) -> None:
        self._shape = llm.info.canvas_length, llm.info.n_vocab
        self.cases = list(cases)
        n_bytes = len(cases) * len(LEVELS) * 4 * self._shape[0] * self._shape[1]
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if n_bytes > IN_MEMORY and n_bytes > free:
            raise OSError(
                f"the reference's logits take {n_bytes / 1e9:.1f} GB in {tempfile.gettempdir()}, "
                f"where {free / 1e9:.1f} GB are free: choose fewer cases, or another TMPDIR"
            )
        # It is closed when this object is left.
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def record(self, llm: DiffusionGemma, progress: Progress = _silent) -> None:
        """Runs the model over all cases."""
        for _, _, logits in predictions(llm, self.cases):
            self._file.write(logits.data)
            progress(1)

    def compare(self, llm: DiffusionGemma, progress: Progress = _silent) -> list[Comparison]:
        """Runs another model over the same cases: what was found at each of LEVELS."""
        if self._shape != (llm.info.canvas_length, llm.info.n_vocab):
            raise ValueError(
                f"the reference has canvases of {self._shape[0]} and {self._shape[1]} tokens in "
                f"the vocabulary, {llm.model_path} {llm.info.canvas_length} and "
                f"{llm.info.n_vocab}: they are not the same model"
            )
        found = [Comparison() for _ in LEVELS]
        self._file.seek(0)
        for case, level, logits in predictions(llm, self.cases):
            for first in range(0, len(logits), SLICE):
                other = logits[first : first + SLICE]
                exact = np.frombuffer(self._file.read(other.nbytes), np.float32)
                targets = case.canvas[first : first + SLICE]
                found[level].add(exact.reshape(other.shape), other, targets)
            progress(1)
        return found

    def __enter__(self) -> Predictions:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def log_softmax(logits: npt.NDArray[np.floating]) -> Doubles:
    """Logarithm of the softmax of the last dimension, in float64."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    return z


@dataclass
class Comparison:
    """Of each position: divergence in nats, whether the first choice is the same, and more.

    `losses` are -log p of the clean canvas's token, of the reference and of the other model.
    """

    divergences: list[Doubles] = field(default_factory=list)
    same: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    losses: tuple[list[Doubles], list[Doubles]] = field(default_factory=lambda: ([], []))

    def add(self, exact: FloatArray, other: FloatArray, targets: IdArray) -> None:
        """Compares logits (n, vocab) of the reference and of another model at n positions."""
        p, q = log_softmax(exact), log_softmax(other)
        # Rounding can leave a sum of no divergence just below zero.
        self.divergences.append(np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0))
        self.same.append(exact.argmax(-1) == other.argmax(-1))
        rows = np.arange(len(targets))
        for losses, log_p in zip(self.losses, (p, q), strict=True):
            losses.append(-log_p[rows, targets])

    def summary(self) -> dict[str, float]:
        """Figures for JSON."""
        return summarize([self])


def summarize(parts: Sequence[Comparison]) -> dict[str, float]:
    """Figures over the positions of all parts; divergences and losses in nats."""
    divergences = np.concatenate([d for part in parts for d in part.divergences])
    reference, own = (
        np.concatenate([loss for part in parts for loss in part.losses[i]]) for i in (0, 1)
    )
    return {
        "kl_mean": float(divergences.mean()),
        "kl_median": float(np.median(divergences)),
        "kl_p99": float(np.quantile(divergences, 0.99)),
        "kl_max": float(divergences.max()),
        "same_first_choice": float(np.concatenate([s for part in parts for s in part.same]).mean()),
        "reference_loss": float(reference.mean()),
        "loss": float(own.mean()),
        "positions": len(divergences),
    }


# ---- Answers -------------------------------------------------------------------------------------


def ask(
    llm: DiffusionGemma, questions: Sequence[Question], seed: int = 0, progress: Progress = _silent
) -> dict[str, Any]:
    """Answers every question: the share of exact answers and the denoising steps per canvas.

    An answer counts when it ends by itself and its text, control tokens included, is the right one.
    """
    kinds: dict[str, dict[str, int]] = {}
    ends = frozenset(llm.info.end_tokens)
    for index, question in enumerate(questions):
        count = kinds.setdefault(question.kind, dict.fromkeys(_COUNTED, 0))
        right = llm.tokenizer.encode(question.answer)
        while right and right[-1] in ends:
            right.pop()
        result = llm.generate(
            llm.tokenizer.encode(question.prompt),
            max_tokens=MAX_CANVASES * llm.info.canvas_length,
            seed=seed + index,
        )
        texts = [llm.tokenizer.decode(ids, special=True) for ids in (right, result.tokens)]
        count["questions"] += 1
        count["right"] += result.finish_reason == "stop" and texts[0] == texts[1]
        count["canvases"] += result.stats.canvases
        count["steps"] += sum(result.stats.steps)
        progress(1)
    total = {name: sum(count[name] for count in kinds.values()) for name in _COUNTED}
    return {**_rates(total), "kinds": {kind: _rates(count) for kind, count in kinds.items()}}


_COUNTED = ("questions", "right", "canvases", "steps")


def _rates(count: dict[str, int]) -> dict[str, float]:
    return {
        **count,
        "accuracy": count["right"] / count["questions"],
        "steps_per_canvas": count["steps"] / count["canvases"],
    }
