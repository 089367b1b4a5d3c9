"""Every option of every command, given what makes no sense: one line and a documented code."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dgemma.cli import main
from dgemma.cli.program import parser

ODD = (
    "9" * 30, "9" * 5000, "-" + "9" * 30, "2147483648", "-2147483649", "18446744073709551616",
    "-1", "nan", "inf", "-inf", "1e999", "1.5", "", " ", "0x10", "1_0", "\u0661", "x", "1,,2", ",",
    "a\0b", "\udcff",
)  # fmt: skip
EACH = 4  # of them an option is given, each option others
# What is asked of a command that needs something: a file that is not there.
MISSING = "no-such-folder/nothing"


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def options() -> list[tuple[str, str]]:
    return [
        (name, action.option_strings[-1])
        for name, command in commands().items()
        for action in command._actions
        if action.option_strings and action.nargs != 0
        and (name, action.dest) != ("synth", "outfile")  # which it would write, of full size
    ]  # fmt: skip


def needed(name: str, but: str) -> list[str]:
    """The arguments without which the command does not run, but for one."""
    command = commands()[name]
    given: list[str] = []
    for group in command._mutually_exclusive_groups:
        if group.required and but not in group._group_actions[0].option_strings:
            given += [group._group_actions[0].option_strings[0], MISSING]
    for action in command._actions:
        if not action.option_strings:
            given += [MISSING] if action.nargs not in ("?", "*") else []
        elif action.required and but not in action.option_strings:
            given += [action.option_strings[0], MISSING]
    return given


@pytest.mark.parametrize(
    ("name", "option", "first"),
    [(name, option, EACH * number) for number, (name, option) in enumerate(options())],
)
def test_odd_values_are_one_line(
    name: str,
    option: str,
    first: int,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for odd in [ODD[(first + i) % len(ODD)] for i in range(EACH)]:
        arguments = [name, *needed(name, option), f"{option}={odd}"]
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        out, err = capsys.readouterr()
        told = f"{arguments!r:.300}: {code}: {err[-600:]}"
        assert code in (0, 1, 2), told
        assert "Traceback" not in err + out, told
        assert "this is a bug" not in err, told
        if code == 1:
            assert err.splitlines()[-1].startswith("dgemma: error: "), told
            assert sum(line.startswith("dgemma: error: ") for line in err.splitlines()) == 1, told
        if code == 2:
            assert "error: " in err.splitlines()[-1], told
        if code == 0:
            assert name in ("doctor", "run"), told  # which need nothing
    assert not list(tmp_path.iterdir()), f"{name} {option} left {list(tmp_path.iterdir())}"
