"""`dgemma serve`: the HTTP server and its page."""

from __future__ import annotations

import argparse

from ..generation.options import make_options
from .shared import (
    Subparsers,
    add_model_options,
    add_sampling_options,
    load_model,
    sampling_options,
)


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser("serve", help="serve the OpenAI API and a page")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8080, help="default: %(default)s; 0: any")
    parser.add_argument("--api-key", metavar="K", help="asked of every request but /health")
    parser.add_argument(
        "--max-queue",
        metavar="N",
        type=int,
        default=256,
        help="requests that may wait (default: %(default)s)",
    )
    parser.add_argument("--alias", metavar="NAME", help="the model's name in the API")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    try:
        from ..server import serve
    except ImportError as problem:
        raise ImportError(
            f"serving needs the extra `server`: pip install 'dgemma[server]' ({problem})"
        ) from None
    with load_model(args) as llm:
        # What a request leaves open.
        options = sampling_options(args)
        llm.seed = options.get("seed")
        llm.sampling = make_options(llm.sampling, **options).sampling
        return serve(
            llm,
            host=args.host,
            port=args.port,
            api_key=args.api_key,
            max_queue=args.max_queue,
            alias=args.alias,
        )
