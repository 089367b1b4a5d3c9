"""Commands of other packages: entry points of the group `dgemma.commands`."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import entry_points

from ..errors import Error
from .common import Subparsers

GROUP = "dgemma.commands"
"""Functions that take argparse's subparsers and add a command of the entry point's name."""


def add_plugins(commands: Subparsers) -> None:
    """Adds them all; one that cannot be loaded is named on standard error."""
    for plugin in sorted(entry_points(group=GROUP), key=lambda plugin: plugin.name):
        try:
            plugin.load()(commands)
        except Exception as problem:  # whatever somebody else's package ends in
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())
            print(f"dgemma: the command {plugin.name} cannot be loaded: {reason}", file=sys.stderr)


def run_plugin(name: str, *arguments: str) -> int:
    """Runs such a command; returns its exit code. Error where it is not installed."""
    for plugin in entry_points(group=GROUP):
        if plugin.name == name:
            parser = argparse.ArgumentParser(prog="dgemma")
            plugin.load()(parser.add_subparsers(required=True))
            args = parser.parse_args([name, *arguments])
            return int(args.run(args) or 0)
    raise Error(f"the command {name} is not installed: reinstall dgemma")
