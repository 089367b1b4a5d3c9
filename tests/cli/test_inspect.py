"""`dgemma inspect`: its verdict is that of the commands that run a file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import support.gguf_builder as b
from dgemma import DiffusionGemma
from dgemma.generation.sessions import sessions_within
from dgemma.gguf_file import File
from dgemma.server.local import LocalEngine
from support.program import run
from support.rewriting import rewrite


def shorter(file: Path) -> dict[str, bytes | None]:
    """A vocabulary without its last token: well formed, but of another size than the embedding."""
    with File(file) as opened:
        tokens = opened.keys["tokenizer.ggml.tokens"][:-1]
        types = opened.keys["tokenizer.ggml.token_type"][:-1]
    return {
        "tokenizer.ggml.tokens": b.array("tokenizer.ggml.tokens", b.STRING, tokens),
        "tokenizer.ggml.token_type": b.array("tokenizer.ggml.token_type", b.INT32, types),
    }


KEYS: dict[str, dict[str, bytes | None]] = {
    "as it is": {},
    "another tokenizer": {
        "tokenizer.ggml.model": b.key("tokenizer.ggml.model", b.STRING, "llama"),
    },
    "no merges": {"tokenizer.ggml.merges": None},
    "no tokenizer": {"tokenizer.ggml.model": None},
    "a begin token that is none": {
        "tokenizer.ggml.bos_token_id": b.key("tokenizer.ggml.bos_token_id", b.UINT32, 10**6),
    },
    "a template that does not compile": {
        "tokenizer.chat_template": b.key("tokenizer.chat_template", b.STRING, "{% if %}"),
    },
    "a template for tools that does not compile": {
        "tokenizer.chat_template.tool_use": b.key(
            "tokenizer.chat_template.tool_use", b.STRING, "{{ "
        ),
    },
    "a template that is a number": {
        "tokenizer.chat_template": b.key("tokenizer.chat_template", b.UINT32, 7),
    },
    "no template": {"tokenizer.chat_template": None},
    "no architecture": {"general.architecture": None},
    "a temperature that is none": {
        "diffusion.eb_t_min": b.key("diffusion.eb_t_min", b.FLOAT32, -1.0),
    },
}
RUN = {"as it is", "no template"}


def other_layout(name: str) -> str | None:
    """Names of the layout that the engine reads with a note."""
    if "enc_layer_output_scale" in name:
        return None
    return name.replace("self_cond_pre_norm", "self_cond_norm")


def lost(name: str) -> str | None:
    return None if name == "blk.1.attn_q.weight" else name


@pytest.mark.parametrize("case", [*KEYS, "a vocabulary too short", "a lost tensor", "a layout"])
def test_inspect_and_generate_agree(
    capsys: pytest.CaptureFixture[str], tiny_gguf: Path, tmp_path: Path, case: str
) -> None:
    planted = tmp_path / "planted.gguf"
    if case == "a vocabulary too short":
        rewrite(tiny_gguf, planted, shorter(tiny_gguf))
    elif case in KEYS:
        rewrite(tiny_gguf, planted, KEYS[case])
    else:
        rewrite(tiny_gguf, planted, rename=lost if case == "a lost tensor" else other_layout)
    code, out, _ = run(capsys, "inspect", planted, "--json")
    found = json.loads(out)
    assert code == 0
    ask = ("generate", "-m", planted, "-p", "Hi", "-n", 1, "--backend", "cpu")
    code, _, err = run(capsys, *ask)
    assert found["runs"] is (code == 0)
    assert found["runs"] is (case in RUN or case == "a layout")
    if not found["runs"]:
        assert err.rstrip("\n") == f"dgemma: error: {found['reason']}"


def test_a_layout_that_is_understood_is_said(
    capsys: pytest.CaptureFixture[str], tiny_gguf: Path, tmp_path: Path
) -> None:
    planted = rewrite(tiny_gguf, tmp_path / "planted.gguf", rename=other_layout)
    _, out, _ = run(capsys, "inspect", planted)
    assert "  note: the file has no enc_layer_output_scale" in out
    assert out.endswith("  runs here\n")
    _, out, _ = run(capsys, "inspect", tiny_gguf)
    assert "note:" not in out


@pytest.mark.parametrize("asked", [512, 0, 2**31 - 1])
def test_what_a_further_session_takes_is_what_a_server_counts(
    capsys: pytest.CaptureFixture[str], tiny_gguf: Path, asked: int
) -> None:
    _, out, _ = run(capsys, "inspect", tiny_gguf, "-c", asked, "--json")
    session = json.loads(out)["session"]
    with DiffusionGemma(tiny_gguf, n_ctx=asked, backend="cpu") as llm:
        assert session["n_ctx"] == llm.default_session.n_ctx
        need = llm.memory()
        assert session["bytes"] == need.cache + need.scratch
        assert sessions_within(3 * session["bytes"], need) == 3
        assert sessions_within(3 * session["bytes"] - 1, need) == 2
        engine = LocalEngine(llm, session_bytes=3 * session["bytes"])
        asyncio.run(engine.close())
        assert engine.card.n_slots == 3
    _, out, _ = run(capsys, "inspect", tiny_gguf, "-c", asked)
    assert f"each further session of a server, context {session['n_ctx']:,}: " in out
