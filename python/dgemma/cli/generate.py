"""`dgemma generate`: one completion."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..generation.events import Generated
from .live import LiveAnswer
from .shared import (
    Subparsers,
    add_model_options,
    add_sampling_options,
    load_model,
    peak_rss_bytes,
    sampling_options,
)


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser("generate", help="complete a prompt, or answer it with --chat")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("-p", "--prompt", metavar="TEXT")
    text.add_argument("--file", metavar="F", help="read the prompt from a file; - is stdin")
    parser.add_argument("--chat", action="store_true", help="apply the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument("--think", action="store_true", help="let the model think, with --chat")
    parser.add_argument(
        "-n", "--max-tokens", metavar="N", type=int, help="default: until the model ends"
    )
    parser.add_argument("--stop", metavar="TEXT", action="append", help="end there; repeatable")
    parser.add_argument("--live", action="store_true", help="show the canvas as it settles")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Completes the prompt and prints the answer."""
    prompt = _prompt(args)
    began = time.perf_counter()
    with load_model(args) as llm:
        load_s = time.perf_counter() - began
        if args.chat:
            messages = [{"role": "system", "content": args.system}] if args.system else []
            messages.append({"role": "user", "content": prompt})
            prompt = llm.chat_template.render(messages, enable_thinking=args.think)
        answer = llm.answer(
            prompt, max_tokens=args.max_tokens, stop=args.stop, **sampling_options(args)
        )
        if args.json:
            for _ in answer:
                pass
            print(json.dumps(report(answer.result, load_s), ensure_ascii=False))
        else:
            with LiveAnswer(llm.tokenizer, live=args.live) as display:
                for event in answer:
                    display.show(event)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    if args.file == "-":
        return sys.stdin.read()
    return Path(args.file).read_text(encoding="utf-8")


def report(result: Generated, load_s: float) -> dict[str, Any]:
    """The answer and its figures, as `--json` prints them."""
    stats = result.stats
    return {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "seed": stats.seed,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "canvases": stats.canvases,
        "steps": stats.steps,
        "timings": {"load_s": load_s, **stats.timings},
        "peak_rss_bytes": peak_rss_bytes(),
    }
