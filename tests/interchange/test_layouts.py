"""Files as llama.cpp's two branches and publishers write them: they run, and `inspect` says so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dgemma.cli import main
from dgemma.compat.llama_cpp import Llama
from dgemma_convert import convert
from support.engine import conversation, open_model, random_tokens
from support.layouts import LAYOUTS, Layout, q8_0, write_layout

QUESTION = (
    "<bos><|turn>user\nName the capital of Spain.<turn|>\n"
    "<|turn>model\n<|channel>thought\n<channel|>"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def foreign(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """models/tiny in one of the layouts."""
    folder = tmp_path_factory.mktemp("layouts")

    def written(name: str) -> Path:
        path = folder / f"{name.replace(' ', '-')}.gguf"
        return path if path.exists() else write_layout(tiny, path, LAYOUTS[name])

    return written


def program(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def agree(capsys: pytest.CaptureFixture[str], path: Path) -> str | None:
    """Why `inspect` says that a file does not run, or None; `generate` says the same."""
    code, out, _ = program(capsys, "inspect", path, "--json")
    found = json.loads(out)
    assert code == 0
    code, _, err = program(
        capsys, "generate", "-m", path, "-p", "Hi", "-n", 1, "--backend", "cpu", "--seed", 0
    )
    assert found["runs"] is (code == 0), err
    if found["runs"]:
        return None
    assert err.rstrip("\n") == f"dgemma: error: {found['reason']}"
    return str(found["reason"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_inspect_and_generate_take_it(
    capsys: pytest.CaptureFixture[str], foreign: Callable[[str], Path], name: str
) -> None:
    assert agree(capsys, foreign(name)) is None


@pytest.mark.parametrize("name", [name for name in LAYOUTS if LAYOUTS[name].encoder_scalars])
def test_it_answers_and_calls_tools(foreign: Callable[[str], Path], name: str) -> None:
    """Whatever types the file gives to the tokens of tools and channels, and to end tokens."""
    with open_model(foreign(name)) as llm:
        answer = llm.generate(QUESTION, max_tokens=32, seed=0)
        assert answer.text == "The capital of Spain is Madrid."
        assert answer.finish_reason == "stop"
    with Llama(str(foreign(name)), n_ctx=512, n_gpu_layers=0, verbose=False) as llama:
        message = {"role": "user", "content": "How is Delhi today?"}
        reply = llama.create_chat_completion([message], tools=[TOOL], max_tokens=64, seed=0)
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Delhi"}


def logits(path: Path, tiny: Path) -> np.ndarray:
    with open_model(path) as llm, llm.session() as session:
        rng = np.random.default_rng(1)
        prompt = rng.integers(0, llm.info.n_vocab, 30).tolist()
        canvases = rng.integers(0, llm.info.n_vocab, (1, llm.info.canvas_length)).tolist()
        return conversation(session, prompt, canvases)


@pytest.mark.parametrize(
    ("name", "outtype"),
    [
        ("24423", "bf16"),
        ("24423 without a generation config", "bf16"),
        ("separate experts", "q8_0"),
    ],
)
def test_it_computes_what_ours_does(
    foreign: Callable[[str], Path], tiny: Path, tmp_path: Path, name: str, outtype: str
) -> None:
    ours = tmp_path / "ours.gguf"
    convert(tiny, ours, outtype, progress=False)
    np.testing.assert_array_equal(logits(foreign(name), tiny), logits(ours, tiny))


def test_without_encoder_scalars_the_decoders_serve(
    foreign: Callable[[str], Path], tiny: Path, tmp_path: Path
) -> None:
    path = foreign("24427")
    same = Layout(type_of=q8_0, encoder_as_decoder=True)
    found = logits(path, tiny)
    expected = logits(write_layout(tiny, tmp_path / "same.gguf", same), tiny)
    np.testing.assert_array_equal(found, expected)
    with open_model(path) as llm:
        assert llm.info.file_note.startswith("the file has no enc_layer_output_scale")


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ("narrow", {"scalar_heads": True}),  # as many key-value heads in every layer
        ("small", {"period": 3}),
    ],
)
def test_one_number_stands_for_a_list(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    spec: str,
    changes: dict[str, object],
) -> None:
    listed = write_layout(checkpoint(spec), tmp_path / "listed.gguf", Layout())
    layout = dataclasses.replace(Layout(), **changes)
    short = write_layout(checkpoint(spec), tmp_path / "short.gguf", layout)
    assert agree(capsys, short) is None
    prompt, canvases = random_tokens(spec, 20, 1)
    with open_model(listed) as a, a.session() as one, open_model(short) as b, b.session() as other:
        np.testing.assert_array_equal(
            conversation(one, prompt, canvases), conversation(other, prompt, canvases)
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"merges": False}, "tokenizer.ggml.merges"),
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"model": "gpt2"}, "tokenizer.ggml.model is 'gpt2'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    tmp_path: Path,
    changes: dict[str, object],
    reason: str,
) -> None:
    layout = dataclasses.replace(Layout(), **changes)
    refused = agree(capsys, write_layout(tiny, tmp_path / "refused.gguf", layout))
    assert refused is not None
    assert reason in refused
