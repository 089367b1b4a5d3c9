"""`dgemma batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import check_target
from ..progress import progress_bar
from .cluster import cluster_settings
from .common import add_common_options, print_json, whole_number
from .shared import Subparsers, add_model_options, load_model


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answers every line of a file in OpenAI's batch format: one line out for each "
        "line in, failures as lines. After Ctrl-C or a crash the same command goes on.",
    )
    parser.add_argument("input", metavar="IN.jsonl", type=Path, help="requests, one a line")
    parser.add_argument(
        "-o", "--output", metavar="OUT.jsonl", type=Path, required=True, help="file to write"
    )
    parser.add_argument(
        "--unordered", action="store_true", help="answers in the order in which they came"
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="ask again what an earlier run of this batch has answered with an error",
    )
    parser.add_argument("--alias", metavar="NAME", help="the model's name in the answers")
    parser.add_argument(
        "--seed",
        metavar="N",
        type=whole_number(0, 2**63 - 1),
        help="of requests that name none (default: a new one each)",
    )
    add_common_options(parser, "force", "json")
    cluster = parser.add_argument_group("cluster (needs the extra `ray`)")
    cluster.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help='over the workers of a Ray cluster: "auto" finds the one of this machine; without an '
        "address one is started for the batch",
    )
    cluster.add_argument(
        "--workers",
        metavar="N",
        type=whole_number(1),
        default=1,
        help="models at once (default: %(default)s)",
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answers, writes, and says what came of it."""
    try:
        from ..batch import run_batch
        from ..batch.run import Answerer, in_this_process
    except ImportError as problem:
        raise ImportError(
            f"batches need the extra `server`: pip install 'dgemma[server]' ({problem})"
        ) from None
    if not args.input.is_file():
        raise FileNotFoundError(f"{args.input}: expected a file of requests, one a line")
    check_target(args.output, replace=args.force)

    def answer(answerer: Answerer) -> int:
        with progress_bar("batch", 1, unit="request") as bar:

            def show(done: int, failed: int, total: int) -> None:
                bar.reach(done, total=total, failed=failed)

            report = run_batch(
                args.input,
                args.output,
                answerer,
                ordered=not args.unordered,
                retry_failed=args.retry_failed,
                progress=show,
            )
        if args.json:
            print_json(report.to_json())
        else:
            print(
                f"wrote {report.file}: {report.requests} answers, {report.failed} of them errors, "
                f"{report.resumed} from an earlier run, in {report.seconds:.0f} s"
            )
        return 0

    if args.ray is not None:
        settings = cluster_settings(args)
        from ..ray.batches import on_cluster
        from ..ray.cluster import connect

        connect(args.ray)
        return answer(on_cluster(settings, workers=args.workers))
    with load_model(args) as llm:
        llm.set_seed(args.seed)
        return answer(in_this_process(llm, alias=args.alias or Path(llm.model_path).stem))
