"""Every way out of the program: one line and a documented exit code, whatever happens."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma.cli import inspect, main

PROGRAM = [sys.executable, "-c", "import sys, dgemma.cli; sys.exit(dgemma.cli.main())"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """Runs the program with a command that does what it is given."""

    def run(what: Callable[[], object]) -> int:
        def pretend(args: argparse.Namespace) -> Any:
            return what()

        monkeypatch.setattr(inspect, "run", pretend)
        return main(["inspect", "x"])

    return run


def raising(problem: BaseException) -> Callable[[], object]:
    def work() -> object:
        raise problem

    return work


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (ValueError("not so"), 1, "not so"),
        (OverflowError("too large"), 1, "too large"),
        (RecursionError("x"), 1, "nested too deeply"),
        (MemoryError(), 1, "not enough memory"),
        (AttributeError("a.b"), 1, "AttributeError: a.b (this is a bug"),
        (KeyError("k"), 1, "KeyError: 'k' (this is a bug"),
        (ZeroDivisionError("x\ny"), 1, "ZeroDivisionError: x y (this is a bug"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 1, ""),
        (SystemExit(2), 2, ""),
    ],
)
def test_whatever_is_raised(
    command: Callable[[Callable[[], object]], int],
    capsys: pytest.CaptureFixture[str],
    problem: BaseException,
    code: int,
    message: str,
) -> None:
    assert command(raising(problem)) == code
    err = capsys.readouterr().err
    assert err.count("\n") == (1 if message else 0), err
    if message:
        assert err.startswith("dgemma: error: ")
        assert message in err


def test_where_a_bug_came_from_can_be_asked_for(
    command: Callable[[Callable[[], object]], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DGEMMA_DEBUG", "1")
    assert command(raising(KeyError("k"))) == 1
    assert "Traceback" in capsys.readouterr().err


class _Interrupted:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_a_destructor_is_not_lost(
    command: Callable[[Callable[[], object]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        thing = _Interrupted()
        del thing  # Python ignores what is raised here
        for _ in range(1000):
            time.sleep(0.01)
        raise AssertionError("went on")

    assert command(work) == 130
    assert capsys.readouterr().err == ""


def test_an_error_after_ctrl_c_is_an_interruption(
    command: Callable[[Callable[[], object]], int],
) -> None:
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("the library made something else of it") from None

    assert command(work) == 130


def test_ctrl_c_while_packages_are_imported(tmp_path: Path) -> None:
    slow = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "import dgemma.cli\n"
        "sys.exit(dgemma.cli.main(['--version']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_ctrl_c_while_commands_of_other_packages_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dgemma.cli.program.add_plugins", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_the_command_line_imports_nothing_before_it_hears_ctrl_c() -> None:
    """What Python itself has loaded by then is all that there may be."""
    program = (
        "import sys; before = {*sys.modules}; import dgemma.cli\n"
        "print(*sorted({*sys.modules} - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert {*done.stdout.split()} - {"__future__"} == {"dgemma", "dgemma.cli"}, done.stderr


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full"])
def test_output_that_cannot_be_written(tiny_gguf: Path, redirection: str) -> None:
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    command = shlex.join([*PROGRAM, "inspect", str(tiny_gguf), "--tensors"])
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("dgemma: error: ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_closed_standard_error_does_not_reach_the_output(tiny_gguf: Path) -> None:
    command = shlex.join([*PROGRAM, "generate", "-m", str(tiny_gguf), "-p", "x"])
    done = subprocess.run(["bash", "-c", f"{command} -n 0 2>&-"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-m", "x", "-p", "x", "-t", "2147483647"],
        ["generate", "-m", "x", "-p", "x", "-c", "99999999999"],
        ["serve", "-m", "x", "--port", "99999"],
        ["bench", "-m", "x", "--prompt-tokens", "9999999999999"],
        ["run"],
    ],
)
def test_numbers_out_of_range_are_wrong_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "{model}", "--n-cpu-moe", str(2**40)], "n_cpu_moe is 1099511627776"),
        (["-m", "{model}", "-ngl", str(-(2**40))], "n_gpu_layers"),
        (["-m", "{model}", "--seed", "9" * 30], "seed"),
        (["-m", "{model}", "--seed", "9" * 5000], "seed"),
        (["-m", "{model}", "--max-denoising-steps", "100001"], "max_denoising_steps"),
        (["-m", "a\0b"], "zero byte"),
        (["-hf", "nonsense"], "USER/REPO"),
    ],
)
def test_numbers_beyond_c_are_one_line(
    tiny_gguf: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [a.replace("{model}", str(tiny_gguf)) for a in arguments]
    codes = [1]
    with contextlib.suppress(SystemExit):  # argparse, where Python does not read such a number
        codes = [main(["generate", "-p", "x", *given])]
    assert codes == [1]
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
