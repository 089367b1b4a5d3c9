"""Stages of gpu.py beside one file's kernels: other types, and Nsight Compute."""

from __future__ import annotations

import csv
import re
import shutil
import statistics
from typing import Any

import random_gguf

# Blocks that most weights of these files have: file type, type of bench/random_gguf.py.
FILE_TYPES = (("nvfp4", "nvfp4"), ("iq4_xs_l", "iq4_xs"), ("q4_k_m", "q4_k"))
SECONDS_FOR_A_TYPE = 45  # to make a full-size file and to load it


def types(run: Any) -> dict[str, Any]:
    """Steps and prompts of other file types at full size. Each file is removed when it is timed."""
    found: dict[str, Any] = {}
    for name, kind in FILE_TYPES:
        if run.left() < SECONDS_FOR_A_TYPE:
            found[name] = {"error": "no time was left"}
            continue
        path = run.folder / f"{run.args.preset}-{name}.gguf"
        try:
            random_gguf.write(run.args.preset, kind, path)
            timed = run.run_steps("time", path, "cuda", str(run.args.n_past), "8", timeout=60)
        finally:
            path.unlink(missing_ok=True)
        found[name] = {
            "step_ms": statistics.median(timed["step_ms"]),
            "prefill_tokens_per_s": timed["prefill_tokens_per_s"],
            "load_s": timed["load_s"],
            "weight_bytes": timed["weight_bytes"],
        }
        run.found["types"] = found
    return found


def nsight(run: Any) -> list[dict[str, Any]] | str:
    """How long Nsight Compute sees each kernel of a step take, alone on the card."""
    run.wait_for_model()
    program = shutil.which("ncu")
    if program is None:
        return "left out: ncu is not on the PATH"
    # Packing at load is thousands of launches that are no part of a step.
    pattern = "regex:^(?!.*(pack|probe)_kernel).*_kernel"
    command = [program, "--clock-control", "none", "--csv", "--metrics", "gpu__time_duration.sum",
               "-k", pattern, run.steps, "profile", run.model, "cuda", str(run.args.n_past),
               "1"]  # fmt: skip
    done = run.command(command, timeout=90, DGEMMA_CUDA_LIBRARY=str(run.backend_file))
    return kernel_times(done.stdout)


def kernel_times(report: str) -> list[dict[str, Any]]:
    """Launches and microseconds of each kernel, from ncu's CSV; what is not a table is left out."""
    lines = report.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    sums: dict[str, list[float]] = {}
    units = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
    for row in csv.DictReader(lines[start:]):
        known = re.search(r"([a-z0-9_]+_kernel)", row["Kernel Name"])
        value = float(row["Metric Value"].replace(",", "")) * units[row["Metric Unit"]]
        entry = sums.setdefault(known[1] if known else row["Kernel Name"], [0, 0.0])
        entry[0] += 1
        entry[1] += value
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return [{"kernel": name, "launches": int(n), "us": us} for name, (n, us) in ordered]


def lines(found: dict[str, Any]) -> list[str]:
    """The stages' part of the report, as Markdown."""
    out: list[str] = []
    if isinstance(found.get("types"), dict):
        out += ["", "| file type | ms a step | prompt tokens/s | load s |",
                "| --- | --- | --- | --- |"]  # fmt: skip
        for name, entry in found["types"].items():
            if "step_ms" in entry:
                rate = entry["prefill_tokens_per_s"]
                out.append(f"| {name} | {entry['step_ms']:.2f} | {rate:.0f} | "
                           f"{entry['load_s']:.1f} |")  # fmt: skip
            else:
                out.append(f"| {name} | {entry['error']} | | |")
    if isinstance(found.get("nsight"), list):
        out += ["", "| kernel (Nsight Compute) | launches | µs each | ms a step |",
                "| --- | --- | --- | --- |"]  # fmt: skip
        for k in found["nsight"]:
            out.append(f"| {k['kernel']} | {k['launches']} | {k['us'] / k['launches']:.1f} | "
                       f"{k['us'] / 1e3:.3f} |")  # fmt: skip
    return out


def describe_environment(variant: dict[str, Any]) -> str:
    """The environment variables that a variant of `contexts` was timed with."""
    return " ".join(f"{k}={v}" for k, v in variant.items() if k.startswith("DGEMMA_"))
