"""What docs/ and examples/ show is run."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma.cli import main
from dgemma.cli.program import parser
from support.serving import running

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.gguf").symlink_to(tiny_gguf)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: str, language: str) -> list[str]:
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_page(folder: Path) -> None:
    found = blocks("python.md", "python")
    assert len(found) > 5
    exec(compile("\n".join(found), "docs/python.md", "exec"), {})


def test_commands_of_the_cli_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("cli.md", "sh")
    lines = block.strip().splitlines()
    assert len(lines) > 3
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "dgemma"
        assert main(arguments) == 0, line
        assert capsys.readouterr().out.strip(), line


def test_commands_of_the_server_page_parse() -> None:
    lines = [line for block in blocks("server.md", "sh") for line in block.splitlines()]
    served = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dgemma")]
    assert len(served) == 2
    for arguments in served:
        assert parser().parse_args(arguments).run


def test_programs_of_the_server_page(
    tiny_gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    found = blocks("server.md", "python")
    assert len(found) > 1
    with running(tiny_gguf) as (address, _):
        program = "\n".join(found).replace("http://127.0.0.1:8080", address)
        exec(compile(program, "docs/server.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "step" in printed


def test_every_command_is_on_the_cli_page() -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    usage = parser().format_help()
    commands = re.findall(r"^    (\w+) ", usage, re.MULTILINE)
    assert {"convert", "generate", "serve"} <= set(commands)
    for command in commands:
        assert f"`dgemma {command} " in page


# ---- Examples ------------------------------------------------------------------------------------


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "examples" / name), run_name="example")


def test_chat_example(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for question, answer in (("What is the capital of France?", "Paris"),
                             ("What is the capital of Italy?", "Rome")):  # fmt: skip
        monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
        example("chat.py")["main"]("model.gguf", "kept.session")
        assert answer in capsys.readouterr().out
    kept = json.loads((folder / "kept.session.json").read_text())
    assert [message["role"] for message in kept] == ["user", "assistant"] * 2
    assert (folder / "kept.session").stat().st_size > 0


@pytest.mark.parametrize("tries", [1, 3])
def test_gap_example(folder: Path, monkeypatch: pytest.MonkeyPatch, tries: int) -> None:
    letter = folder / "letter.txt"
    letter.write_text("The old man [...] by the sea.")
    arguments = ["fill_gap.py", "model.gguf", "letter.txt", "--tokens", "6", "--seed", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--tries", str(tries)])
    monkeypatch.setattr("builtins.input", lambda _: "2")
    example("fill_gap.py")["main"]()
    text = letter.read_text()
    assert text.startswith("The old man ")
    assert text.endswith(" by the sea.")
    assert "[...]" not in text


@pytest.mark.parametrize(
    ("question", "called", "answer"),
    [
        ("Is it sunny in Oslo?", 'get_weather({"city": "Oslo"})', "cloudy in Oslo, 12 degrees"),
        ("What time is it in Rome?", 'get_time({"city": "Rome"})', "Rome"),
    ],
)
def test_agent_example(
    folder: Path, capsys: pytest.CaptureFixture[str], question: str, called: str, answer: str
) -> None:
    agent = example("agent.py")
    assert "error" in json.loads(agent["call"]("get_weather", {}))
    assert "error" in json.loads(agent["call"]("get_weather", {"city": "Atlantis"}))
    assert "error" in json.loads(agent["call"]("nothing", {}))
    with dgemma.DiffusionGemma("model.gguf", n_ctx=1024) as llm:
        assert answer in agent["run"](llm, question, seed=1)
    assert called in capsys.readouterr().err
