"""What `serve --ray` and `batch --ray` have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .shared import request_options

if TYPE_CHECKING:
    from ..ray import Settings


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """The options of `serve` that concern a cluster."""
    group = parser.add_argument_group("cluster (needs the extra `ray`)")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help='serve with replicas on a Ray cluster: "auto" finds the one of this machine; without '
        "an address one is started here",
    )
    group.add_argument(
        "--replicas",
        metavar="N[:MAX]",
        type=_replicas,
        default=(1, None),
        help="models at once; up to MAX where requests wait (default: 1)",
    )
    group.add_argument("--cpus-per-replica", metavar="N", type=float, help="default: 1")
    group.add_argument(
        "--gpus-per-replica", metavar="N", type=float, help="default: 1 where there are GPUs"
    )


def _replicas(text: str) -> tuple[int, int | None]:
    low, _, high = text.partition(":")
    numbers = int(low), int(high) if high else None
    if numbers[0] < 1 or (numbers[1] is not None and numbers[1] < numbers[0]):
        raise ValueError(text)
    return numbers


def serve_cluster(args: argparse.Namespace) -> int:
    """Serves on a cluster until it is told to stop."""
    settings = cluster_settings(args)
    from ..ray.cluster import serve_on_ray
    from ..server.access import api_keys
    from ..server.run import log_to_stderr, served_names, warn_if_open

    sampling = {name: value for name, value in request_options(args).items() if name != "seed"}
    keys, budget = api_keys(args.api_key, args.api_key_file), args.session_memory
    update = {
        "api_keys": keys,
        "max_queue": args.max_queue,
        "sessions": args.sessions,
        "session_bytes": None if budget is None else int(budget * 2**30),
        "hosts": served_names(args.host, args.allowed_host),
        "origins": tuple(args.cors_origin),
        "strict": args.strict,
        "sampling": sampling,
        "replicas": args.replicas[0],
        "max_replicas": args.replicas[1],
        "cpus": args.cpus_per_replica,
        "gpus": args.gpus_per_replica,
    }
    settings = settings.model_copy(update=update)
    log_to_stderr()
    warn_if_open(args.host, keys)
    return serve_on_ray(settings, address=args.ray, host=args.host, port=args.port)


def cluster_settings(args: argparse.Namespace) -> Settings:
    """What each model of a cluster is opened with, from the options of a command."""
    try:
        from ..ray import Settings
    except ImportError as problem:
        raise ImportError(
            f"--ray needs the extra `ray`: pip install 'dgemma[ray]' ({problem})"
        ) from None
    # A path is looked up by processes that started in other folders.
    model = None if args.model is None else str(Path(args.model).resolve())
    return Settings(
        model=model,
        hf_repo=args.hf_repo,
        alias=args.alias,
        n_ctx=args.ctx_size,
        n_threads=args.threads or None,
        n_gpu_layers=args.n_gpu_layers,
        n_cpu_moe=args.n_cpu_moe,
        device=args.device,
        tensor_split=args.tensor_split,
        backend=args.backend,
        type_k=args.cache_type_k,
        type_v=args.cache_type_v,
        seed=args.seed,
    )
