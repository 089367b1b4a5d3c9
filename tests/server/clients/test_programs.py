"""Programs in JavaScript, Go and Rust as they are, where `make test-clients` has installed them.

Agents ask for more than models/tiny knows, so the server follows a script when they ask: their
tool is called, it runs, and what it said comes back. The packages get models/tiny's own answers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.clients import CLOUDY, PARIS
from support.scripted import REPORT, scripted
from support.serving import KEY, running

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPTS = Path(__file__).parent / "programs"
INSTALLED = Path(os.environ.get("DGEMMA_PROGRAMS") or REPOSITORY / "build" / "clients")
COMMAND = "echo found-$((40+2))"
CALLS = {
    "Bash": {"command": COMMAND, "description": "Counts"},  # Claude Code, Continue
    "exec_command": {"cmd": COMMAND},  # Codex
    "run_commands": {"commands": [COMMAND]},  # Cline
}
QUESTION = "What is 40+2?"


def program(name: str) -> str:
    path = INSTALLED / "node_modules" / ".bin" / name
    if shutil.which("node") is None or not path.exists():
        pytest.skip(f"{name} is not installed: `make test-clients` does it where there is npm")
    return str(path)


@pytest.fixture(scope="module")
def scripted_server(tiny_gguf: Path) -> Iterator[str]:
    with running(tiny_gguf, "--api-key", KEY, before=scripted(CALLS)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def thinking_server(tiny_gguf: Path) -> Iterator[str]:
    with running(tiny_gguf, "--api-key", KEY, before=scripted(CALLS, thinking=True)) as (a, _):
        yield a


def run(folder: Path, *command: str, **variables: str) -> str:
    """What a program says that knows nothing of whoever runs the tests."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
    done = subprocess.run(
        command,
        cwd=work,
        env={**kept, "HOME": str(home), "NO_PROXY": "127.0.0.1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def claude(server: str, folder: Path) -> dict[str, Any]:
    said = run(
        folder,
        *(program("claude"), "-p", QUESTION, "--output-format", "json"),
        *("--allowedTools", "Bash(echo:*)"),
        ANTHROPIC_BASE_URL=server,
        ANTHROPIC_API_KEY=KEY,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
    )
    return dict(json.loads(said))


def test_claude_code_calls_its_tool(scripted_server: str, tmp_path: Path) -> None:
    told = claude(scripted_server, tmp_path)
    assert (told["is_error"], told["num_turns"]) == (False, 2)
    assert told["result"] == f"{REPORT}value:found-42"
    assert told["usage"]["output_tokens"] > 0


def test_claude_code_takes_thoughts_with_calls(thinking_server: str, tmp_path: Path) -> None:
    told = claude(thinking_server, tmp_path)
    assert (told["is_error"], told["num_turns"]) == (False, 2)
    assert told["result"] == f"{REPORT}value:found-42"


def codex(server: str, folder: Path) -> str:
    settings = folder / "home" / ".codex"
    settings.mkdir(parents=True)
    provider = f"""
model = "tiny"
model_provider = "dgemma"
[model_providers.dgemma]
name = "dgemma"
base_url = "{server}/v1"
wire_api = "responses"
env_key = "DGEMMA_KEY"
[analytics]
enabled = false
"""
    (settings / "config.toml").write_text(provider, encoding="utf-8")
    return run(
        folder,
        *(program("codex"), "exec", "--skip-git-repo-check"),
        *("--dangerously-bypass-approvals-and-sandbox", QUESTION),
        DGEMMA_KEY=KEY,
    )


@pytest.mark.parametrize("kind", ["scripted_server", "thinking_server"])
def test_codex_calls_its_tool(request: Any, kind: str, tmp_path: Path) -> None:
    program("codex")
    said = codex(request.getfixturevalue(kind), tmp_path)
    assert REPORT in said
    assert "found-42" in said.partition(REPORT)[2]


def test_continue_calls_its_tool(scripted_server: str, tmp_path: Path) -> None:
    config = f"""
name: local
version: 0.0.1
schema: v1
models:
  - name: dgemma
    provider: openai
    model: tiny
    apiBase: {scripted_server}/v1
    apiKey: {KEY}
    capabilities: [tool_use]
    roles: [chat]
"""
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    said = run(
        tmp_path,
        *(program("cn"), "-p", "--auto", "--config", str(tmp_path / "config.yaml"), QUESTION),
        CONTINUE_TELEMETRY_ENABLED="0",
    )
    assert f"{REPORT}value:found-42" in said


def test_cline_calls_its_tool(scripted_server: str, tmp_path: Path) -> None:
    name = "openai-compatible"
    options = ("-k", KEY, "-m", "tiny")
    run(tmp_path, program("cline"), "auth", "-p", name, *options, "-b", f"{scripted_server}/v1")
    said = run(
        tmp_path,
        program("cline"),
        "--json",
        "--auto-approve",
        "true",
        "-P",
        name,
        *options,
        QUESTION,
    )
    told = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    last = next(each for each in told if each["type"] == "run_result")
    assert (last["finishReason"], last["iterations"]) == ("completed", 2)
    assert "found-42" in last["text"]


def script(name: str, server: str, folder: Path) -> dict[str, Any]:
    """What a script says; it stands where its packages are."""
    if shutil.which("node") is None or not (INSTALLED / "node_modules" / "openai").exists():
        pytest.skip("needs node and its packages: `make test-clients` installs them")
    placed = INSTALLED / f"{name}-{os.getpid()}.mjs"
    placed.write_text((SCRIPTS / f"{name}.mjs").read_text(encoding="utf-8"), encoding="utf-8")
    try:
        said = run(folder, "node", str(placed), OPENAI_BASE_URL=f"{server}/v1", OPENAI_API_KEY=KEY)
    finally:
        placed.unlink()
    return dict(json.loads(said.splitlines()[-1]))


def test_the_package_openai(server: str, tmp_path: Path) -> None:
    told = script("openai", server, tmp_path)
    assert told.pop("usage") > 0
    assert told == {
        "whole": PARIS,
        "streamed": PARIS,
        "tools": CLOUDY,
        "streamedTools": CLOUDY,
        "parsed": "string",
        "response": CLOUDY,
        "streamedResponse": PARIS,
        "refused": [400, "unsupported_parameter", "logprobs"],
    }


def test_the_ai_sdk(server: str, tmp_path: Path) -> None:
    told = script("ai", server, tmp_path)
    assert told.pop("usage") > 0
    assert told == {
        "whole": PARIS,
        "streamed": PARIS,
        "steps": [[["get_weather", {"city": "Oslo"}]], []],
        "tools": CLOUDY,
        "streamedTools": CLOUDY,
        "object": "string",
    }
