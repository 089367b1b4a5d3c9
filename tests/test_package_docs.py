"""What docs/ and examples/ show is run."""

from __future__ import annotations

import io
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma.cli import main
from dgemma.cli.main import parser

REPOSITORY = Path(__file__).resolve().parents[1]


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
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    example("chat.py")["main"]("model.gguf")
    assert "Paris" in capsys.readouterr().out


def test_gap_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letter = folder / "letter.txt"
    letter.write_text("The old man [...] by the sea.")
    arguments = ["fill_gap.py", "model.gguf", "letter.txt", "--tokens", "6", "--seed", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    example("fill_gap.py")["main"]()
    text = letter.read_text()
    assert text.startswith("The old man ")
    assert text.endswith(" by the sea.")
    assert "[...]" not in text


def test_agent_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = example("agent.py")
    assert agent["call"]("add", {"a": 1, "b": 2}) == "3.0"
    assert agent["call"]("add", {}).startswith("error")
    assert agent["call"]("nothing", {}).startswith("error")
    with dgemma.DiffusionGemma("model.gguf", n_ctx=1024) as llm:
        # The tiny model has not learnt these tools: a script stands in for what it would say.
        said = [
            {
                "tool_calls": [
                    {"id": "1", "function": {"name": "add", "arguments": '{"a":2,"b":3}'}}
                ]
            },
            {"content": "It is 5."},
        ]
        asked: list[Any] = []

        def answer(messages: Any, **_: Any) -> dict[str, Any]:
            llm.chat_template.render(messages, tools=agent["TOOLS"])
            asked.append(list(messages))
            message = {"role": "assistant", "content": None, **said[len(asked) - 1]}
            return {"choices": [{"message": message}]}

        monkeypatch.setattr(llm, "create_chat_completion", answer)
        assert agent["run"](llm, "2 + 3?") == "It is 5."
        assert asked[1][-1] == {"role": "tool", "tool_call_id": "1", "content": "5.0"}
