"""`dgemma generate`: one completion."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ..generation.events import Generated
from .common import add_common_options, print_json
from .live import LiveAnswer
from .shared import (
    Subparsers,
    add_length_options,
    add_model_options,
    add_sampling_options,
    load_model,
    peak_rss_bytes,
    request_options,
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
    add_length_options(parser)
    parser.add_argument("--stop", metavar="TEXT", action="append", help="end there; repeatable")
    parser.add_argument("--live", action="store_true", help="show the canvas as it settles")
    add_common_options(parser, "json")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Completes the prompt and prints the answer."""
    prompt, options = _prompt(args), request_options(args)
    began = time.perf_counter()
    with load_model(args) as llm:
        load_s = time.perf_counter() - began
        if args.chat:
            messages = [{"role": "system", "content": args.system}] if args.system else []
            messages.append({"role": "user", "content": prompt})
            prompt = llm.chat_template.render(messages, enable_thinking=args.think)
        answer = llm.answer(prompt, **options)
        if args.json:
            for _ in answer:
                pass
            print_json(report(answer.result, load_s))
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
