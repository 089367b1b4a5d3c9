"""`dgemma serve`: the HTTP server and its page."""

from __future__ import annotations

import argparse

from ..generation.options import make_options
from .cluster import add_cluster_options, serve_cluster
from .common import whole_number
from .shared import (
    Subparsers,
    add_model_options,
    add_sampling_options,
    load_model,
    request_options,
)


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser("serve", help="serve the OpenAI API and a page")
    _add_access_options(parser)
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--max-queue",
        metavar="N",
        type=int,
        default=256,
        help="requests that may wait (default: %(default)s)",
    )
    group.add_argument(
        "--sessions",
        metavar="N",
        type=int,
        help="conversations whose beginnings are kept (default: what fits --session-memory)",
    )
    group.add_argument(
        "--session-memory",
        metavar="GIB",
        type=float,
        help="memory for them (default: a tenth of the machine's, and at most 8 sessions)",
    )
    group.add_argument(
        "--strict", action="store_true", help="refuse options without effect and unknown fields"
    )
    group.add_argument("--alias", metavar="NAME", help="the model's name in the API")
    add_cluster_options(parser)
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    """Where it listens, and who may ask."""
    group = parser.add_argument_group("access")
    group.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    group.add_argument(
        "--port",
        metavar="N",
        type=whole_number(0, 65535),
        default=8080,
        help="default: %(default)s; 0: any",
    )
    group.add_argument(
        "--api-key", metavar="K", action="append", help="asked of every request but /health"
    )
    group.add_argument("--api-key-file", metavar="F", help="file with keys, one a line")
    group.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="further name that the server may be addressed by; repeatable, * for any",
    )
    group.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="web page that may ask, as https://name[:port]; repeatable, * for any",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    if args.ray is not None:
        return serve_cluster(args)
    try:
        from ..server import serve
        from ..server.access import api_keys
    except ImportError as problem:
        raise ImportError(
            f"serving needs the extra `server`: pip install 'dgemma[server]' ({problem})"
        ) from None
    keys = api_keys(args.api_key, args.api_key_file)
    for name in ("sessions", "session_memory", "max_queue"):
        value = getattr(args, name)
        if value is not None and value < (name == "sessions"):
            raise ValueError(f"--{name.replace('_', '-')} is {value}: too small")
    budget = args.session_memory
    options = request_options(args)  # what a request leaves open
    with load_model(args) as llm:
        llm.seed = options.get("seed")
        llm.sampling = make_options(llm.sampling, **options).sampling
        return serve(
            llm,
            host=args.host,
            port=args.port,
            api_keys=keys,
            max_queue=args.max_queue,
            alias=args.alias,
            n_sessions=args.sessions,
            session_bytes=None if budget is None else int(budget * 2**30),
            allowed_hosts=args.allowed_host,
            origins=args.cors_origin,
            strict=args.strict,
        )
