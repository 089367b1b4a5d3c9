"""What each mix gives to which tensor, and that docs/mixes.md says what was measured."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from dgemma_convert import convert
from dgemma_convert.policy import DEFAULT_MIX, MIXES
from dgemma_convert.synth import preset_tensors

REPOSITORY = Path(__file__).resolve().parents[2]


def types(outtype: str) -> dict[str, set[str]]:
    """The types of the released model's tensors, by their names without the layer's number."""
    found = defaultdict(set)
    for step in preset_tensors("26b-a4b", outtype):
        found[re.sub(r"^blk\.\d+\.", "", step.tensor.name)].add(step.tensor.type.name)
    return found


def size(outtype: str) -> int:
    steps = preset_tensors("26b-a4b", outtype)
    return sum(info.n_bytes for step in steps for info in step.infos)


def test_medium() -> None:
    found = types("q4_k_m")
    assert found["ffn_gate_up_exps.weight"] == {"Q4_K"}
    assert found["ffn_down_exps.weight"] == {"Q5_0"}
    assert found["attn_q.weight"] == {"Q6_K"}
    assert found["ffn_down.weight"] == {"Q8_0"}
    assert found["ffn_gate_inp.weight"] == found["attn_norm.weight"] == {"F32"}


def test_the_default_gives_eight_bits_to_what_every_token_meets() -> None:
    assert DEFAULT_MIX == "iq4_xs_l"
    found = types(DEFAULT_MIX)
    assert found.pop("ffn_gate_up_exps.weight") == {"IQ4_XS"}
    assert found.pop("ffn_down_exps.weight") == {"IQ4_NL"}
    assert set().union(*found.values()) == {"Q8_0", "F32"}
    assert 14e9 < size(DEFAULT_MIX) < 15e9


@pytest.mark.parametrize("bits", ["q3_k", "q4_k", "q5_k"])
def test_small_medium_large(bits: str) -> None:
    assert size(f"{bits}_s") < size(f"{bits}_m")
    assert types(f"{bits}_s")["attn_q.weight"] == {bits.upper()}
    assert types(f"{bits}_s")["token_embd.weight"] == {"Q6_K"}
    assert size("iq4_xs") < size("iq4_xs_l")


def test_the_name_of_the_default_file(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = convert(checkpoint("small"), progress=False, model_name="model")
    assert report.files == ["model-IQ4_XS_L.gguf"]
    assert (tmp_path / "model-IQ4_XS_L.gguf").is_file()


def test_the_page_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench"))
    import outtypes

    results = json.loads(outtypes.RESULTS.read_text())
    assert set(results) == set(outtypes.ROWS)
    assert {name for name in MIXES if name not in ("auto", "f32")} <= set(results)
    for name in ("mixes.md", "mixes.svg"):
        (tmp_path / name).write_text((REPOSITORY / "docs" / name).read_text())
    monkeypatch.setattr(outtypes, "DOCS", tmp_path)
    outtypes.write_docs(results)
    for name in ("mixes.md", "mixes.svg"):
        assert (tmp_path / name).read_text() == (REPOSITORY / "docs" / name).read_text()
    sys.modules.pop("outtypes")
