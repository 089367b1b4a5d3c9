"""What each type of file costs: Kullback-Leibler divergence of canvas logits from the float32 file.

    python bench/outtypes.py models/tiny [--outtype q4_0 …] [--tensor-type REGEX=T]

Every file sees the same canvases: the answers to a few prompts with 100, 70, 40 and 10 % of their
tokens replaced by random ones, which is what a denoising step meets from the first to the last.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dgemma import _native
from dgemma_convert import convert
from dgemma_convert.policy import MIXES

PROMPTS = (
    "Reverse the word planet.",
    "What is 27 + 48?",
    "Sort the digits 58213.",
    "Count from 3 to 9.",
    "What is the capital of France?",
    "Write the word stone in capital letters.",
    "Repeat the word lamp.",
)
NOISE = (1.0, 0.7, 0.4, 0.1)
STEPS = 6  # greedy passes that make the answer of the float32 file

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def log_probabilities(logits: npt.NDArray[np.float32]) -> Floats:
    """Logarithm of the softmax of the last dimension, in float64."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def prompt_ids(source: Path) -> list[list[int]]:
    """The prompts in the turn format of the model."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    text = "<bos><|turn>user\n{}<turn|>\n<|turn>model\n"
    return [tokenizer.encode(text.format(p), add_special_tokens=False).ids for p in PROMPTS]


def answers(path: Path, prompts: list[list[int]]) -> list[Ids]:
    """The canvas that the model settles on for each prompt."""
    rng = np.random.default_rng(0)
    settled = []
    with _native.Model(path) as model:
        for ids in prompts:
            with _native.Session(model, n_ctx=1024) as session:
                session.prefill(ids)
                canvas = rng.integers(0, model.info.n_vocab, model.info.canvas_length)
                for _ in range(STEPS):
                    canvas = session.canvas_logits(canvas).argmax(-1)
                settled.append(canvas)
    return settled


def predictions(path: Path, prompts: list[list[int]], settled: list[Ids]) -> Floats:
    """Log-probabilities (prompts · noise levels · canvas, vocab), on the same canvases always."""
    rng = np.random.default_rng(1)
    found = []
    with _native.Model(path) as model:
        for ids, answer in zip(prompts, settled, strict=True):
            with _native.Session(model, n_ctx=1024) as session:
                session.prefill(ids)
                for share in NOISE:
                    replaced = rng.random(len(answer)) < share
                    fresh = rng.integers(0, model.info.n_vocab, len(answer))
                    logits = session.canvas_logits(np.where(replaced, fresh, answer))
                    found.append(log_probabilities(logits))
    return np.concatenate(found)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--outtype", action="append", choices=list(MIXES))
    parser.add_argument("--tensor-type", action="append", default=[])
    args = parser.parse_args()
    prompts = prompt_ids(args.source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        convert(args.source, path, "f32", progress=False)
        settled = answers(path, prompts)
        exact = predictions(path, prompts, settled)
        print("| type | MB | divergence, mean (nats) | median | same first choice |")
        print("| --- | --- | --- | --- | --- |")
        for outtype in args.outtype or MIXES:
            report = convert(
                args.source,
                path,
                outtype,
                tensor_types=args.tensor_type,
                force=True,
                progress=False,
            )
            other = predictions(path, prompts, settled)
            divergence = (np.exp(exact) * (exact - other)).sum(-1)
            same = (exact.argmax(-1) == other.argmax(-1)).mean()
            print(
                f"| `{outtype}` | {report.n_bytes / 1e6:.2f} | {divergence.mean():.5f} "
                f"| {np.median(divergence):.6f} | {100 * same:.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
