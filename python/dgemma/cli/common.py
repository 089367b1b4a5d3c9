"""Options that several commands have, declared once; for commands of other packages too.

def add_parser(commands):
    parser = commands.add_parser("mine", help="…")
    add_common_options(parser, "threads", "force", "json", "progress")
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._native import MAX_THREADS

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = Any


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers between two bounds, for argparse's `type`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number") from None
        if number < low or (high is not None and number > high):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range: expected {bounds}")
        return number

    return read


_COMMON: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "json": (("--json",), {"action": "store_true", "help": "print one JSON object"}),
    "force": (("--force",), {"action": "store_true", "help": "replace an existing file"}),
    "seed": (
        ("--seed",),
        {"metavar": "N", "type": whole_number(0, 2**63 - 1), "default": 0, "help": "default: 0"},
    ),
    "ctx_size": (
        ("-c", "--ctx-size"),
        {
            "metavar": "N",
            "type": whole_number(0, 2**31 - 1),
            "default": 8192,
            "help": "tokens of context (default: %(default)s; 0: the model's own)",
        },
    ),
    "threads": (
        ("-t", "--threads"),
        {
            "metavar": "N",
            "type": whole_number(0, MAX_THREADS),
            "default": 0,
            "help": "default: one a physical core",
        },
    ),
    "progress": (
        ("--progress",),
        {
            "action": argparse.BooleanOptionalAction,
            "default": None,
            "help": "show progress bars (default: on a terminal)",
        },
    ),
}


def add_common_options(parser: Any, *names: str) -> None:
    """Adds some of the options of `_COMMON`, by their names there, to a parser or a group."""
    for name in names:
        flags, settings = _COMMON[name]
        parser.add_argument(*flags, **settings)


def print_json(value: Any) -> None:
    """What `--json` prints: one object on one line."""
    print(json.dumps(value, ensure_ascii=False))
