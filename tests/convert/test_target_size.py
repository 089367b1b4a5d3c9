"""`quantize --target-size`: the best types for a file of a given size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dgemma.cli import main
from dgemma_convert import ConvertError, convert, quantize
from dgemma_convert.encode import plan
from dgemma_convert.policy import MIXES, make_policy
from dgemma_convert.requantize import foretell_file
from dgemma_convert.synth import PRESETS, RandomSource, _rows, preset_tensors
from dgemma_convert.target_size import (
    SENSITIVITIES,
    Choice,
    Type,
    _hull,
    foretell,
    parse_target,
    plan_size,
)
from dgemma_convert.tensors import MappedTensor

REPOSITORY = Path(__file__).resolve().parents[2]


def test_sizes() -> None:
    for text, n in (("11.5GiB", 23 << 29), ("12GB", 12 * 10**9), ("500m", 5 * 10**8), ("7", 7)):
        assert parse_target(text) == n
    for text in ("", "x", "-1G", "0", "1.5.2G", "4 bananas"):
        with pytest.raises(ConvertError, match=r"expected a size such as 11\.5GiB or 12GB"):
            parse_target(text)


def test_sensitivities_are_those_that_were_measured() -> None:
    results = json.loads((REPOSITORY / "bench" / "results" / "outtypes.json").read_text())
    rows = [name for name in results if name.startswith("only ")]
    measured = [
        float(np.sqrt(results[row]["tiny"]["kl_mean"] * results[row]["random"]["kl_mean"]))
        for row in rows
    ]
    assert len(rows) == len(SENSITIVITIES)
    np.testing.assert_allclose(sorted(SENSITIVITIES.values()), sorted(measured), rtol=5e-3)


def test_the_foretold_order_is_the_measured_one(tiny: Path, tmp_path: Path) -> None:
    """Of all mixes; what was measured is by bench/outtypes.py, on the same two models."""
    results = json.loads((REPOSITORY / "bench" / "results" / "outtypes.json").read_text())
    exact = tmp_path / "exact.gguf"
    convert(tiny, exact, "f32", progress=False)
    mixes = [name for name in MIXES if name not in ("auto", "f32", "f16", "bf16")]
    foretold = {name: foretell_file(exact, name) for name in mixes}

    def measured(name: str) -> float:
        return float(np.sqrt(results[name]["tiny"]["kl_mean"] * results[name]["random"]["kl_mean"]))

    def rank_correlation(a: list[float], b: list[float]) -> float:
        ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
        return float(np.corrcoef(*ranks)[0, 1])

    both = rank_correlation(list(foretold.values()), list(map(measured, mixes)))
    alone = rank_correlation(
        list(foretold.values()), [results[name]["tiny"]["kl_mean"] for name in mixes]
    )
    print(
        f"rank correlation over {len(mixes)} mixes: {both:.4f}, with models/tiny alone {alone:.4f}"
    )
    assert both > 0.98
    assert alone > 0.98
    ratios = [foretold[name] / measured(name) for name in mixes if name != "q8_0"]
    assert 0.5 < min(ratios) < max(ratios) < 2


def released_rows(outtype: str) -> list[MappedTensor]:
    """Weights with the released model's rows, but few of them: a sliding and a full layer."""
    preset = PRESETS["26b-a4b"]
    config = dataclasses.replace(
        preset, layers=preset.layers[4:6], vocab=preset.vocab // 15, experts=preset.experts
    )
    return [
        MappedTensor(name, row.kind, RandomSource(name, shape, shape[-1] ** -0.5, 0))
        for name, row, shape in _rows(config, make_policy(outtype))
    ]


@pytest.mark.parametrize("mix", ["iq4_xs_l", "q3_k_m", "iq3_xxs", "iq2_s", "q2_k"])
def test_the_best_mix_is_at_least_as_good_as_a_named_one(mix: str) -> None:
    tensors, policy = released_rows(mix), make_policy(mix)
    size = sum(step.tensor.n_bytes for step in plan(tensors, policy))
    found = plan_size(tensors, make_policy("auto"), size)
    assert found.n_bytes <= size
    assert found.divergence <= foretell(tensors, policy) * (1 + 1e-9)


def test_the_named_mixes_for_cards_of_12_gb_fit() -> None:
    for mix, gib in (("iq3_xxs", 11.5), ("iq2_s", 10.5)):
        steps = preset_tensors("26b-a4b", mix)
        assert 0.95 * gib * 2**30 < sum(step.tensor.n_bytes for step in steps) < gib * 2**30


def test_the_hull_leaves_out_what_another_beats() -> None:
    best, worse = Choice(Type.Q8_0, 100, 1.0), Choice(Type.Q6_K, 90, 5.0)
    good, small = Choice(Type.Q4_K, 80, 2.0), Choice(Type.Q2_K, 40, 20.0)
    assert _hull([worse, best, small, good]) == [best, good, small]
    assert _hull([Choice(Type.Q5_1, 100, 3.0), Choice(Type.Q5_0, 90, 3.0)]) == [
        Choice(Type.Q5_0, 90, 3.0)
    ]


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_a_file_fits(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    source, path = gguf_file("wide", "bf16"), tmp_path / "model.gguf"
    size = source.stat().st_size // 2
    report = quantize(source, path, "best", target_size=size, progress=False)
    assert 0.9 * size < path.stat().st_size <= size
    assert report.outtype == f"{size} bytes"
    assert len(set(types(path).values())) > 2


def test_smaller_files_have_smaller_types(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    source, path = gguf_file("wide", "bf16"), tmp_path / "model.gguf"
    previous = None
    for share in (0.45, 0.3, 0.2):
        size = int(source.stat().st_size * share)
        report = quantize(source, path, "best", target_size=size, dry_run=True, progress=False)
        found = {tensor.name: tensor.n_bytes for tensor in report.tensors}
        assert sum(found.values()) <= size
        assert previous is None or all(n <= previous[name] for name, n in found.items())
        previous = found
    assert {"iq2_xs", "iq2_s"} & set(report.types)
    with pytest.raises(ConvertError, match=r"the smallest types take .*, more than"):
        quantize(source, path, "best", target_size=1000, progress=False)
    assert not path.exists()


def test_exceptions_stay(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    source, path = gguf_file("wide", "bf16"), tmp_path / "model.gguf"
    size, rules = source.stat().st_size // 4, [r"attn_q\.weight=f16"]
    report = quantize(
        source, path, "best", target_size=size, tensor_types=rules, dry_run=True, progress=False
    )
    found = {tensor.type for tensor in report.tensors if "attn_q.weight" in tensor.name}
    assert found == {"f16"}
    assert report.n_bytes <= size


def test_command(gguf_file: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    source, path, plot = gguf_file("wide", "bf16"), tmp_path / "m.gguf", tmp_path / "m.svg"
    size = source.stat().st_size // 2
    command = ["quantize", str(source), str(path), "best", "--target-size", str(size)]
    assert main([*command, "--plot", str(plot), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert path.stat().st_size <= size
    bits = 8 * report["n_bytes"] / report["n_parameters"]
    assert report["bits_per_weight"] == pytest.approx(bits)
    assert plot.read_text().startswith("<svg")
    for kind, options in (("best", []), ("q8_0", ["--target-size", "1G"])):
        assert main(["quantize", str(source), str(path), kind, *options]) == 1
        assert "a target size goes with the type 'best'" in capsys.readouterr().err
    assert main(["quantize", str(source), str(path), "q8_0", "--plot", "x.svg"]) == 1
    assert "--plot draws what --target-size finds" in capsys.readouterr().err
