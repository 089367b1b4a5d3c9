"""Reads the command line, runs a command, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from .._native import version
from ..errors import Error
from . import bench, chat, evaluate, generate, imatrix, inspect, serve

DONE, FAILED, INTERRUPTED = 0, 1, 130  # wrong usage is 2: argparse's own
PLUGINS = "dgemma.commands"
"""Entry points of this group add commands: functions that take argparse's subparsers."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; a command's function is its `run`."""
    top = argparse.ArgumentParser(
        prog="dgemma",
        description="Run DiffusionGemma, a block text-diffusion language model, on this machine.",
    )
    top.add_argument("--version", action="version", version=f"dgemma {version()}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    imatrix.add_parser(commands)
    inspect.add_parser(commands)
    generate.add_parser(commands)
    chat.add_parser(commands)
    serve.add_parser(commands)
    bench.add_parser(commands)
    evaluate.add_parser(commands)
    for plugin in sorted(entry_points(group=PLUGINS), key=lambda plugin: plugin.name):
        try:
            plugin.load()(commands)
        except Exception as problem:  # whatever somebody else's package ends in
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())
            print(f"dgemma: the command {plugin.name} cannot be loaded: {reason}", file=sys.stderr)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return DONE if code is None else int(code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has enough, as `head` does. Python would complain again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except MemoryError:
        return _failed("not enough memory")
    except (Error, ImportError, OSError, TypeError, ValueError) as problem:
        return _failed(str(problem) or type(problem).__name__)


def _failed(message: str) -> int:
    print(f"dgemma: error: {' '.join(message.split())}", file=sys.stderr)
    return FAILED
