"""`dgemma bench`, and the cache that is filled rather than encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import dgemma
from dgemma import DiffusionGemma
from dgemma.cli import main

FIELDS = {
    "step_ms", "prefill_tokens_per_s", "load_s", "first_step_s", "peak_rss_bytes",
    "peak_vram_bytes", "operations", "limits", "shares", "backend", "threads", "model",
}  # fmt: skip


def bench(capsys: pytest.CaptureFixture[str], model: Path, *arguments: object) -> dict[str, Any]:
    given = ["bench", "-m", model, "--steps", 3, "-c", 512, "-t", 1, "--json", *arguments]
    assert main([str(a) for a in given]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def ordered(spread: dict[str, float]) -> bool:
    return 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_fields(capsys: pytest.CaptureFixture[str], tiny_gguf: Path) -> None:
    found = bench(capsys, tiny_gguf, "--prompt-tokens", 40)
    assert set(found) >= FIELDS
    assert ordered(found["step_ms"])
    for name in ("prefill_tokens_per_s", "load_s", "first_step_s", "peak_rss_bytes"):
        assert found[name] > 0
    assert found["load_s"] + found["first_step_ms"] / 1e3 <= found["first_step_s"]
    assert found["peak_vram_bytes"] is None
    assert (found["threads"], found["prompt_tokens"]) == (1, 40)
    operations = {o["name"]: o for o in found["operations"]}
    assert operations["experts"]["gflop_per_s"] > 0
    assert sum(o["ms"] for o in operations.values()) <= 1.05 * 3 * found["step_ms"]["max"]
    assert found["limits"]["read_gb_per_s"] > 0
    share = operations["experts"]["shares"]["read_gb_per_s"]
    reads = found["limits"]["read_gb_per_s"]
    assert share == pytest.approx(operations["experts"]["gb_per_s"] / reads)


def test_several_prompts_and_contexts(
    capsys: pytest.CaptureFixture[str], tiny_gguf: Path, tmp_path: Path
) -> None:
    figure = tmp_path / "figures.svg"
    lengths = ["--prompt-tokens", "8,64", "--context", "0,100,700"]  # 700 is beyond the context
    found = bench(capsys, tiny_gguf, *lengths, "--plot", figure)
    assert [p["tokens"] for p in found["prefill"]] == [8, 64]
    assert all(ordered(p["ms"]) for p in found["prefill"])
    assert found["prefill_tokens_per_s"] == found["prefill"][0]["tokens_per_s"]
    assert [c["n_past"] for c in found["contexts"]] == [0, 100, 700]
    assert all(ordered(c["step_ms"]) and c["operations"] for c in found["contexts"])
    drawn = ElementTree.fromstring(figure.read_text())
    texts = {e.text for e in drawn.iter() if e.tag.endswith("text")}
    assert {"experts", "ms a step", "Denoising steps", "Prefill", "prompt tokens"} <= texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "0"], "--prompt-tokens"),
        (["--context", "-1"], "--context"),
        (["--context", "99999999"], "model's context"),
        (["--plot", "figure.nonsense"], "nonsense"),
    ],
)
def test_errors(
    capsys: pytest.CaptureFixture[str], tiny_gguf: Path, arguments: list[str], message: str
) -> None:
    given = ["bench", "-m", str(tiny_gguf), "--steps", "1", "-c", "256", "-t", "1", *arguments]
    assert main(given) == 1
    assert message in capsys.readouterr().err


# ---- A cache of random rows ----------------------------------------------------------------------


def work(session: Any) -> dict[str, tuple[float, float]]:
    """Operations and bytes of one step."""
    session.begin_canvas()
    session.reset_operations()
    session.step()
    return {o.name: (o.flop, o.bytes) for o in session.operations()}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_random_rows_are_as_much_work_as_a_prompt(tiny_gguf: Path, kind: str) -> None:
    with DiffusionGemma(tiny_gguf, n_ctx=600, n_batch=16, type_k=kind, type_v=kind) as llm:
        encoded, filled = llm.default_session, llm.session()
        n = 300  # beyond the sliding layers' rings
        encoded.prefill(np.arange(n) % llm.info.n_vocab)
        filled.append_random(100)
        assert filled.append_random(n - 100) == n
        assert work(filled) == work(encoded)
        canvas = list(range(llm.info.canvas_length))
        with llm.session() as empty:
            alone = empty.canvas_logits(canvas)
        logits = filled.canvas_logits(canvas)
        assert np.isfinite(logits).all()
        assert np.abs(logits - alone).max() > 1e-3, "the rows are not looked at"
        assert filled.truncate(n - 1) == n - 1
        assert len(filled.tokens) == n - 1


def test_random_rows_must_leave_room_for_a_canvas(tiny_gguf: Path) -> None:
    with DiffusionGemma(tiny_gguf, n_ctx=256) as llm:
        session = llm.default_session
        with pytest.raises(dgemma.ContextLengthError):
            session.append_random(256 - llm.info.canvas_length + 1)
        with pytest.raises(ValueError, match="-1 random tokens"):
            session.append_random(-1)
        assert session.n_past == 0
        assert session.append_random(256 - llm.info.canvas_length) == 256 - llm.info.canvas_length
