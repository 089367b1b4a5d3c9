"""What commands say of GPUs: how a file would be divided, and which one is taken."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from dgemma.cli import main
from support import small_model
from support.serving import running

PROGRAM = [sys.executable, "-c", "import sys, dgemma.cli; sys.exit(dgemma.cli.main())"]


def test_inspect_divides_a_file_over_cards(
    tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny_gguf), "--gpu-memory", "4,2", "-c", "512", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    division, n_layers = found["division"], found["model"]["n_layers"]
    assert division["fits"]
    assert division["n_ctx"] == 512
    assert [share["available"] for share in division["gpus"]] == [4 << 30, 2 << 30]
    assert sum(share["n_layers"] for share in division["gpus"]) == n_layers
    assert sum(share["total"] for share in division["gpus"]) == division["total"]
    assert main(["inspect", str(tiny_gguf), "--gpu-memory", "4,2", "-c", "512"]) == 0
    out = capsys.readouterr().out
    first, second = (share["n_layers"] for share in division["gpus"])
    assert f"GPU 0: the embedding and {first} layers, " in out
    assert f"GPU 1: {second} layers, " in out
    assert main(["inspect", str(tiny_gguf), "--gpu-memory", "0.1", "--json"]) == 0
    division = json.loads(capsys.readouterr().out)["division"]
    assert not division["fits"]
    assert "embedding, head and scratch alone need" in division["reason"]


@pytest.mark.parametrize("cards", ["", "4,x", "0", "-1", ",".join(["1"] * 17)])
def test_cards_that_are_none(
    tiny_gguf: Path, capsys: pytest.CaptureFixture[str], cards: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tiny_gguf), f"--gpu-memory={cards}"])
    assert ended.value.code == 2
    assert "--gpu-memory" in capsys.readouterr().err


def test_generate_takes_the_gpu_that_is_named(
    tiny_gguf: Path,
    cuda_library: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (
        ("DGEMMA_CUDA_LIBRARY", str(cuda_library)),
        ("DGEMMA_EMULATION_DEVICES", "2"),
        ("DGEMMA_EMULATION_CAPABILITIES", "80,75"),
    ):
        monkeypatch.setenv(name, value)
    command = ["generate", "-m", str(tiny_gguf), "-p", "x", "-c", "512"]
    assert main([*command, "--device", "7"]) == 1
    said = capsys.readouterr().err
    assert 'device "7" is none of the GPUs here (0: emulated GPU A, 1: emulated GPU B)' in said
    assert main([*command, "--device", "GPU B"]) == 1
    assert "compute capability 7.5" in capsys.readouterr().err
    assert main(["doctor", "-t", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cuda"]
    assert [gpu["number"] for gpu in found["gpus"]] == [0, 1]
    assert found["usable"]


@pytest.fixture
def lost(tmp_path: Path, cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model on an (emulated) card that is lost in the first layer of a prompt."""
    monkeypatch.setenv("DGEMMA_CUDA_LIBRARY", str(cuda_library))
    monkeypatch.setenv("DGEMMA_EMULATION_LOST_AT", "CombineTask")
    return small_model.write(tmp_path / "small.gguf")


def test_a_lost_card_ends_a_command_with_one_line(lost: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "generate", "-m", lost, "-p", "<3>", "--device", "0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"dgemma: error: CUDA, in .*: unspecified launch failure\n", done.stderr)


def test_a_server_outlives_its_card(lost: Path) -> None:
    with (
        running(lost, "--device", "0") as (address, process),
        httpx.Client(base_url=address, timeout=120) as http,
    ):
        for _ in range(2):
            answer = http.post("/v1/completions", json={"prompt": "<3>", "max_tokens": 4})
            assert answer.status_code == 500
            assert "unspecified launch failure" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
