"""`dgemma run`: from the name of a model to a conversation with it."""

from __future__ import annotations

import argparse
import os

from .chat import add_chat_options, talk
from .obtain import obtain, split_name
from .shared import Subparsers, add_model_options, load_model, request_options


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "run",
        help="download a model, convert it if need be, and talk with it",
        description="Downloads USER/REPO[:TYPE] from the Hugging Face hub (what was interrupted "
        "continues), converts it where the repository has a checkpoint and no GGUF file of that "
        "type, fits it to this machine, and begins a conversation. A file of this machine is "
        "loaded as it is.",
    )
    parser.add_argument("name", metavar="USER/REPO[:TYPE]", help="or a GGUF file")
    add_chat_options(parser)
    add_model_options(parser, source=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talks until the input ends."""
    request_options(args)  # wrong ones are said before anything is downloaded
    if os.path.isfile(args.name):
        path = args.name
    else:
        split_name(args.name)
        path = obtain(args.name, threads=args.threads)
    with load_model(args, path) as llm:
        return talk(llm, args)
