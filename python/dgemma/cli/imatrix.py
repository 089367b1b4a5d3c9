"""`dgemma imatrix`: which columns of the weights matter, for the converter's `--imatrix`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..evaluation.calibration import Calibration, chat_prompts, gather, text_chunks
from ..importance import AVERAGE_TOKENS, save_importance
from ..progress import progress_bar
from .common import add_common_options, print_json
from .shared import Subparsers, add_model_options, load_model


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "imatrix",
        help="gather an importance matrix, for convert --imatrix and quantize --imatrix",
        description="Encodes a text in pieces, denoises a canvas behind each, and adds up the "
        "squares of the activations that meet each column of each weight.",
    )
    parser.add_argument(
        "-f", "--file", metavar="TEXT", type=Path, required=True, help="text of the kind to expect"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        default=Path("imatrix.gguf"),
        help="file to write; llama.cpp's older form if it ends with .dat (default: %(default)s)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="every line is the first message of a conversation"
    )
    parser.add_argument(
        "--chunk-size",
        metavar="N",
        type=int,
        default=512,
        help="tokens of text that are encoded at a time (default: %(default)s)",
    )
    parser.add_argument("--chunks", metavar="N", type=int, help="at most so many (default: all)")
    parser.add_argument(
        "--canvases",
        metavar="N",
        type=int,
        default=1,
        help="canvases to denoise behind each, at most (default: %(default)s)",
    )
    add_common_options(parser, "seed", "force", "json")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Gathers, writes, and says what was seen."""
    for name in ("chunk_size", "chunks", "canvases"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: expected 1 or more")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise ValueError(f"{args.output}: expected the name of a file in an existing folder")
    if args.output.exists() and not args.force:
        raise ValueError(f"{args.output}: exists; --force replaces it")
    if args.backend == "auto":
        args.backend = "cpu"  # the only one that collects
    text = args.file.read_text(encoding="utf-8")
    with load_model(args) as llm:
        prompts = (
            chat_prompts(llm, text) if args.chat else text_chunks(llm, text, args.chunk_size)
        )[: args.chunks]
        if not prompts:
            raise ValueError(f"{args.file}: has no text")
        began = time.perf_counter()
        with progress_bar("imatrix", len(prompts), unit="prompt") as bar:

            def show(done: int, steps: int) -> None:
                bar.reach(done, steps=steps)

            found = gather(llm, prompts, canvases=args.canvases, seed=args.seed, progress=show)
        seconds = time.perf_counter() - began
    save_importance(
        args.output,
        found.activations,
        dataset=str(args.file),
        chunk_count=found.n_chunks,
        chunk_size=max(map(len, prompts)),
    )
    report = {"file": str(args.output), **summary(found), "seconds": seconds}
    if args.json:
        print_json(report)
    else:
        print(
            "wrote {file}: {entries} tensors, from {prompt_tokens} tokens of prompts and {steps} "
            "denoising steps of {canvases} canvases in {seconds:.0f} s".format(**report)
        )
        if report["rare_experts"]:
            print(
                f"{report['rare_experts']} of {report['experts']} experts met fewer than "
                f"{AVERAGE_TOKENS} tokens: they lean on their layer's average. More text helps."
            )
    return 0


def summary(found: Calibration) -> dict[str, Any]:
    """What was seen, in numbers."""
    # Every expert has a down projection of its own name, whether gate and up are fused or not.
    experts = [a.counts for n, a in found.activations.items() if n.endswith("ffn_down_exps.weight")]
    return {
        "entries": sum(bool(a.counts.any()) for a in found.activations.values()),
        "chunks": found.n_chunks,
        "prompt_tokens": found.prompt_tokens,
        "canvases": found.canvases,
        "steps": found.steps,
        "experts": sum(len(counts) for counts in experts),
        "rare_experts": sum(int((counts < AVERAGE_TOKENS).sum()) for counts in experts),
    }
