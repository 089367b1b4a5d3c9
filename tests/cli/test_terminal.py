"""What a person sees in a terminal, in a real one: tmux shows the screen as it is."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TMUX = shutil.which("tmux")
pytestmark = pytest.mark.skipif(TMUX is None, reason="needs tmux: apt-get install tmux")

PROGRAM = [sys.executable, "-c", "import sys, dgemma.cli; sys.exit(dgemma.cli.main())"]
# Never settles, and is uncertain all the while.
SLOW = ("--confidence-threshold", "1e-30", "--max-denoising-steps", "10000", "--temperature", "1.6")
QUESTION = "Count from 3 to 40."


class Screen:
    """The program in a terminal of its own."""

    def __init__(
        self, folder: Path, arguments: tuple[object, ...], width: int, height: int
    ) -> None:
        folder.mkdir()
        self._environment = {**os.environ, "TMUX_TMPDIR": str(folder), "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "TMUX"):
            self._environment.pop(name, None)
        # The shell takes Ctrl-C too, and must outlive it.
        program = shlex.join([*PROGRAM, *map(str, arguments)])
        command = f"trap : INT; {program}; echo left with $?; sleep 600"
        self._tmux("new-session", "-d", "-x", str(width), "-y", str(height), command)

    def _tmux(self, *arguments: str) -> str:
        assert TMUX is not None
        done = subprocess.run(
            [TMUX, "-f", "/dev/null", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def lines(self) -> list[str]:
        """What stands on the screen, without empty lines."""
        shown = self._tmux("capture-pane", "-p").splitlines()
        return [line.rstrip() for line in shown if line.strip()]

    def styled(self) -> str:
        return self._tmux("capture-pane", "-e", "-p")

    def wait_for(self, is_there: Callable[[list[str]], bool], seconds: float = 60) -> list[str]:
        end = time.monotonic() + seconds
        while not is_there(lines := self.lines()):
            assert time.monotonic() < end, "\n".join(lines)
            time.sleep(0.05)
        return lines

    def wait_for_step(self, after: int = 0) -> int:
        """Waits for a later step to be drawn, and returns its number."""

        def step(lines: list[str]) -> int:
            found = [line for line in lines if line.startswith("canvas 1, step ")]
            return int(found[-1].rsplit(" ", 1)[1]) if found else 0

        return step(self.wait_for(lambda lines: step(lines) > after))

    def type(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        """While the program stands still: between its look at the size and its drawing, nobody can
        tell it that the size has changed."""
        shell = self._tmux("list-panes", "-F", "#{pane_pid}").strip()
        program = int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])
        os.kill(program, signal.SIGSTOP)
        self._tmux("resize-window", "-x", str(width), "-y", str(height))
        os.kill(program, signal.SIGCONT)

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Screen]]:
    opened: list[Screen] = []

    def opening(*arguments: object, width: int = 80, height: int = 24) -> Screen:
        folder = tmp_path / str(len(opened))
        opened.append(Screen(folder, arguments, width, height))
        return opened[-1]

    yield opening
    for screen in opened:
        screen.close()


def test_a_draft_is_shaded_and_goes_away_when_it_is_done(
    terminal: Callable[..., Screen], tiny_gguf: Path
) -> None:
    ask = ("generate", "-m", tiny_gguf, "-c", 512, "--chat", "--seed", 1, "--live")
    screen = terminal(*ask, "-p", "What is the capital of France?")
    lines = screen.wait_for(lambda lines: "left with 0" in lines)
    assert lines == ["The capital of France is Paris.", "left with 0"]
    slow = terminal("chat", "-m", tiny_gguf, "-c", 512, *SLOW)
    slow.wait_for(lambda lines: ">" in lines)
    slow.type(QUESTION, "Enter")
    slow.wait_for_step()
    assert "\x1b[38;5;2" in slow.styled()  # greys


def test_resizing_leaves_one_draft(terminal: Callable[..., Screen], tiny_gguf: Path) -> None:
    screen = terminal("chat", "-m", tiny_gguf, "-c", 512, "--seed", 1, *SLOW)
    screen.wait_for(lambda lines: ">" in lines)
    screen.type(QUESTION, "Enter")
    step = screen.wait_for_step()
    for width, height in ((24, 24), (100, 24), (30, 8), (60, 5), (80, 24)):
        screen.resize(width, height)
        step = screen.wait_for_step(after=screen.wait_for_step(after=step))
        lines = screen.lines()
        assert sum(line.startswith("3 4") for line in lines) <= 1, lines
        assert sum(line.startswith("canvas 1, step") for line in lines) == 1, lines
    screen.type("C-c")
    screen.wait_for(lambda lines: lines[-2:] == ["(stopped)", ">"])


def test_ctrl_c_stops_and_the_chat_goes_on(
    terminal: Callable[..., Screen], tiny_gguf: Path
) -> None:
    screen = terminal("chat", "-m", tiny_gguf, "-c", 512, "--seed", 1, *SLOW)
    screen.wait_for(lambda lines: ">" in lines)
    screen.type(QUESTION, "Enter")
    screen.wait_for_step()
    screen.type("C-c")
    lines = screen.wait_for(lambda lines: lines[-1] == ">")
    assert lines[-3:] == [f"> {QUESTION}", "(stopped)", ">"]
    screen.type("/stats", "Enter")
    screen.wait_for(lambda lines: any("tokens/s" in line for line in lines))
    screen.type("C-c")
    screen.wait_for(lambda lines: lines[-1] == ">" and lines[-2].strip("^C ") == ">")
    screen.type("C-c")
    lines = screen.wait_for(lambda lines: "left with" in lines[-1])
    assert lines[-1].endswith("left with 130")
    assert not any("Traceback" in line for line in lines)
