"""Commands that other packages add by entry points."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from dgemma.cli import main as command
from dgemma.cli.program import parser


def test_the_converters_commands_are_plugins() -> None:
    usage = parser().format_help()
    for name in ("convert", "quantize", "synth"):
        assert f"    {name} " in usage


def test_a_plugin_that_does_not_load_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(group: str) -> list[Any]:
        return [EntryPoint("broken", "dgemma_nowhere:add", group)]

    monkeypatch.setattr(sys.modules["dgemma.cli.plugins"], "entry_points", found)
    with pytest.raises(SystemExit) as done:
        command(["--version"])
    assert done.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("dgemma ")
    assert captured.err == (
        "dgemma: the command broken cannot be loaded: "
        "ModuleNotFoundError: No module named 'dgemma_nowhere'\n"
    )
