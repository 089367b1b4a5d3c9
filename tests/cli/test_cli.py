"""The program: what it prints, its exit codes, and one line for every error."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from dgemma import DiffusionGemma
from dgemma.cli import main
from dgemma.cli.program import parser
from support.program import run

QUESTION = "What is the capital of France?"
PROGRAM = [sys.executable, "-c", "import sys, dgemma.cli; sys.exit(dgemma.cli.main())"]


def test_generate(capsys: pytest.CaptureFixture[str], tiny_gguf: Path) -> None:
    ask = ("generate", "-m", tiny_gguf, "-p", QUESTION, "--chat", "--seed", 1, "-c", 512)
    code, out, err = run(capsys, *ask)
    assert (code, err) == (0, "")
    assert "Paris" in out
    code, as_json, _ = run(capsys, *ask, "--json")
    found = json.loads(as_json)
    assert code == 0
    assert found["text"] == out.rstrip("\n")
    assert found["finish_reason"] == "stop"
    assert found["completion_tokens"] == len(found["tokens"])
    assert len(found["steps"]) == found["canvases"]
    assert found["seed"] == 1
    assert found["peak_rss_bytes"] > 10**6
    assert {"load_s", "prompt_s", "generation_s", "total_s"} <= set(found["timings"])


def test_live_without_a_terminal_is_plain(
    capsys: pytest.CaptureFixture[str], tiny_gguf: Path
) -> None:
    ask = ("generate", "-m", tiny_gguf, "-p", QUESTION, "--chat", "--seed", 1, "-c", 512)
    plain = run(capsys, *ask)
    assert run(capsys, *ask, "--live") == plain
    assert "\x1b" not in plain[1]


def test_prompts_from_files(
    capsys: pytest.CaptureFixture[str],
    tiny_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("-m", tiny_gguf, "-n", 4, "--seed", 1, "-c", 512)
    (tmp_path / "prompt").write_text("The old man")
    given = run(capsys, "generate", "-p", "The old man", *options)
    assert run(capsys, "generate", "--file", tmp_path / "prompt", *options) == given
    monkeypatch.setattr("sys.stdin", io.StringIO("The old man"))
    assert run(capsys, "generate", "--file", "-", *options) == given


def test_inspect(capsys: pytest.CaptureFixture[str], tiny_gguf: Path, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "inspect", tiny_gguf)
    assert code == 0
    assert "diffusion-gemma" in out
    assert "runs here" in out
    assert re.search(r"^ +attention +q8_0 [\d.]+ kB$", out, re.MULTILINE)
    assert "GPU memory" in out
    code, out, _ = run(capsys, "inspect", tiny_gguf, "--json")
    found = json.loads(out)
    assert found["runs"] is True
    assert found["n_tensors"] == len(found["tensors"])
    assert sum(tensor["bytes"] for tensor in found["tensors"]) <= found["bytes"]
    assert found["mix"]["experts_down"].keys() == {"q8_0"}
    of_all_kinds = sum(sum(sizes.values()) for sizes in found["mix"].values())
    assert of_all_kinds == sum(found["bytes_per_type"].values())
    sizes = [need["total"] for need in found["memory"]]
    assert sizes == sorted(sizes)
    for plan in found["gpu"]:  # a small model fits every card
        session = max(plan["cache"] + plan["scratch"], 64 << 20)  # buffers while it is loaded
        assert plan["total"] == plan["weights"] + session + plan["reserve"]
        whole = (found["model"]["n_layers"], 0)
        for card in plan["cards"].values():
            assert (card["n_gpu_layers"], card["n_cpu_moe"]) == whole
    assert {plan["cache_type"] for plan in found["gpu"]} == {"f16", "q8_0"}
    with DiffusionGemma(tiny_gguf) as llm:
        assert found["model"]["canvas_length"] == llm.info.canvas_length
    code, out, _ = run(capsys, "inspect", tiny_gguf, "--tensors")
    assert "blk.0.attn_q.weight" in out


@pytest.mark.parametrize("asked", [["-ngl", "5"], ["--n-cpu-moe", "2"]])
def test_a_gpu_that_is_not_there_is_not_passed_over_in_silence(
    capsys: pytest.CaptureFixture[str],
    tiny_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
) -> None:
    monkeypatch.setenv("DGEMMA_CUDA_LIBRARY", "/nowhere/libdgemma_cuda.so")
    options = ["-m", tiny_gguf, "-p", "The old man", "-n", 2, "--seed", 1, "-c", 256]
    code, _, err = run(capsys, "generate", *options, *asked)
    assert code == 0
    assert "the CUDA backend cannot be loaded" in err
    code, _, err = run(capsys, "generate", *options, *asked, "--backend", "cuda")
    assert code == 1
    assert "dgemma: error: the CUDA backend cannot be loaded" in err
    assert 'use the CPU (backend "cpu" or "auto")' in err


def test_n_gpu_layers_on_the_cpu_is_said_to_be_unused(
    capsys: pytest.CaptureFixture[str], tiny_gguf: Path
) -> None:
    options = ["-m", tiny_gguf, "-p", "The old man", "-n", 2, "--seed", 1, "-c", 256]
    _, _, err = run(capsys, "generate", *options, "--backend", "cpu", "-ngl", 3)
    assert "n_gpu_layers is not used" in err
    code, _, err = run(capsys, "generate", *options, "-ngl", "-2")
    assert code == 1
    assert "n_gpu_layers is -2" in err


def test_inspect_says_why_a_file_does_not_run(
    capsys: pytest.CaptureFixture[str], gemma4: Path
) -> None:
    code, out, _ = run(capsys, "inspect", gemma4 / "vocab.gguf", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["runs"] is False
    assert "gemma4" in found["reason"]


def test_convert_and_synth_are_there(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    target = tmp_path / "made.gguf"
    code, _, _ = run(capsys, "convert", tiny, "--outtype", "q8_0", "--outfile", target)
    assert code == 0
    code, out, err = run(capsys, "convert", tiny, "--outtype", "q8_0", "--outfile", target)
    assert (code, out) == (1, "")
    assert err.startswith("dgemma: error: ")
    assert parser().parse_args(["synth", "--outfile", "x"]).run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "-m", "nowhere.gguf", "-p", "x"], "nowhere.gguf"),
        (["generate", "-m", "{model}", "-p", "x", "--temperature", "11"], "temperature"),
        (["generate", "-m", "{model}", "-p", "x", "-n", "0"], "max_tokens"),
        (["generate", "-m", "{model}", "--file", "nowhere.txt"], "nowhere.txt"),
        (["generate", "-m", "{model}", "-p", "x " * 3000, "-c", "256"], "context"),
        (["inspect", "nowhere.gguf"], "nowhere.gguf"),
        (["bench", "-m", "{model}", "--steps", "0"], "--steps"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tiny_gguf: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *(a.replace("{model}", str(tiny_gguf)) for a in arguments))
    assert (code, out) == (1, "")
    assert re.fullmatch(r"dgemma: error: .*\n", err)
    assert message in err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate"], ["chat"], ["bench", "-m"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_a_reader_that_goes_away_is_no_error(tiny_gguf: Path) -> None:
    command = shlex.join([*PROGRAM, "inspect", str(tiny_gguf), "--tensors"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- Conversations -------------------------------------------------------------------------------


def talk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: Path, *lines: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run(capsys, "chat", "-m", path, "--seed", 1, "-c", 1024)


def test_chat(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_gguf: Path,
    tmp_path: Path,
) -> None:
    saved = tmp_path / "conversation.json"
    code, out, err = talk(
        capsys,
        monkeypatch,
        tiny_gguf,
        *(QUESTION, "/stats", f"/save {saved}", "/clear", f"/load {saved}", "/help", "/quit"),
    )
    assert (code, err) == (0, "")
    assert "Paris" in out
    assert "steps per canvas" in out
    assert "/system TEXT" in out
    assert saved.with_name("conversation.json.session").stat().st_size > 0
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert "Paris" in messages[1]["content"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks at open files in /proc")
def test_saving_that_fails_keeps_the_older_conversation(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_gguf: Path,
    tmp_path: Path,
) -> None:
    saved = tmp_path / "conversation.json"
    talk(capsys, monkeypatch, tiny_gguf, QUESTION, f"/save {saved}")
    before = saved.read_bytes()

    write = os.write

    def full(fd: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with monkeypatch.context() as patched:
        patched.setattr("dgemma.files.os.write", full)
        code, _, err = talk(capsys, patched, tiny_gguf, "Hi", f"/save {saved}", "/stats")
    assert code == 0
    assert "conversation.json: no space left on the device" in err
    assert saved.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {saved.name, f"{saved.name}.session"}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"system": null, "messages": 5}', "[]", "5"])
def test_what_is_no_conversation(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_gguf: Path,
    tmp_path: Path,
    text: str,
) -> None:
    saved = tmp_path / "deep.json"
    saved.write_text(text)
    code, out, err = talk(capsys, monkeypatch, tiny_gguf, f"/load {saved}", "/stats")
    assert code == 0
    assert "deep.json is no saved conversation" in err
    assert "no answer yet" in out


def test_a_loaded_chat_is_not_encoded_again(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_gguf: Path,
    tmp_path: Path,
) -> None:
    saved = tmp_path / "conversation.json"
    talk(capsys, monkeypatch, tiny_gguf, QUESTION, f"/save {saved}")
    again = (f"/load {saved}", "What is the capital of Italy?", "/stats")
    _, out, err = talk(capsys, monkeypatch, tiny_gguf, *again)
    assert err == ""
    assert "Rome" in out
    found = re.search(r"prompt (\d+) tokens, (\d+) of them already encoded", out)
    assert found is not None
    assert int(found[2]) > 10
    (tmp_path / "conversation.json.session").write_bytes(b"damaged")
    _, out, err = talk(capsys, monkeypatch, tiny_gguf, *again)
    assert "encoded again" in err
    assert "Rome" in out
    assert "tokens, 0 of them already encoded" in out


def test_chat_survives_mistakes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_gguf: Path,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    lines = ["/nonsense", "/save", f"/load {broken}", "/load nowhere", "word " * 2000, "/stats"]
    code, out, err = talk(capsys, monkeypatch, tiny_gguf, *lines)
    assert code == 0
    assert "no answer yet" in out
    for part in ("/nonsense", "name of a file", "broken.json", "nowhere", "context"):
        assert part in err


def _take_terminal() -> None:
    """Ctrl-C reaches a program through its controlling terminal, unless it inherits ignoring it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *arguments: object, columns: int = 80) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen[-300:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the program has gone
                    assert text in self.seen, f"{text!r} did not come: {self.seen[-300:]!r}"

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:
                    break
        code = self.process.wait(10)
        os.close(self.master)
        return code


SLOW = ("--confidence-threshold", "1e-30", "--max-denoising-steps", "5000")


def test_the_canvas_is_drawn_on_a_terminal(tiny_gguf: Path) -> None:
    terminal = Terminal(
        *("generate", "-m", tiny_gguf, "-p", QUESTION, "--chat", "--seed", 1, "--live", "-c", 512)
    )
    terminal.wait_for("canvas 1, step 1")
    terminal.wait_for("Paris")
    assert terminal.end() == 0
    assert "\x1b[?25h" in terminal.seen  # the cursor is back


def test_ctrl_c_ends_a_live_answer(tiny_gguf: Path) -> None:
    terminal = Terminal(
        *("generate", "-m", tiny_gguf, "-p", QUESTION, "--chat", "--live", "-c", 512), *SLOW
    )
    terminal.wait_for("step 3")
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.seen


def test_ctrl_c_once_stops_an_answer_and_twice_leaves(tiny_gguf: Path) -> None:
    terminal = Terminal("chat", "-m", tiny_gguf, "-c", 512, *SLOW)
    terminal.wait_for("> ")
    terminal.type(f"{QUESTION}\n")
    terminal.wait_for("step 3")
    terminal.type("\x03")
    terminal.type("/stats\n")
    terminal.wait_for("tokens/s")
    terminal.type("\x03")
    time.sleep(0.5)
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.seen
