"""What bench/gpu.py writes down: the device, its kernels beside its limits, and the report."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import gpu_more
import random_gguf

REPOSITORY = Path(__file__).resolve().parents[1]


def commit() -> str:
    """What was measured; "" where this is not a checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def earlier_result(results: Path, like: dict[str, Any]) -> dict[str, Any] | None:
    """The newest report of the same device, type and size that has measured steps."""
    found = []
    for path in results.glob("*.json"):
        with contextlib.suppress(ValueError, OSError, AttributeError):  # others are there as well
            report = json.loads(path.read_text(encoding="utf-8"))
            same = all(report.get(k) == like[k] for k in ("device", "type", "preset"))
            if same and "step_ms" in report.get("time", {}):
                found.append(report)
    return max(found, key=lambda report: str(report["date"]), default=None)


def device_name() -> str:
    """The first GPU."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return listed.stdout.splitlines()[0].strip()
    return "no GPU"


HOPPER = "DGEMMA_CUDA_HOPPER"  # 1: GPUs of compute capability 9.0 use kernels of their own


def has_own_kernels() -> bool:
    """Whether the first GPU is of compute capability 9.0."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return listed.stdout.splitlines()[0].strip() == "9.0"
    return False


# Which tensors a kernel reads, once in a step.
READS = {
    "gate_up_kernel": r"ffn_(gate_up|gate|up)_exps\.weight",
    "down_kernel": r"ffn_down_exps\.weight",
    "matmul_kernel": r"(attn_(q|k|v|output)|ffn_(gate|up|down|gate_inp)|self_cond_\w+)\.weight",
    "statistics_kernel": r"token_embd\.weight",
}


def work_of(preset: random_gguf.Preset, kind: str) -> dict[str, tuple[float, float]]:
    """Bytes of weights and operations of a step, by kernel."""
    tensors = random_gguf.all_tensors(preset, kind)
    work = {}
    for kernel, pattern in READS.items():
        n_bytes = flop = 0.0
        for t in tensors:
            if not re.fullmatch(rf"(blk\.\d+\.)?{pattern}", t.name) or len(t.shape) < 2:
                continue
            n_bytes += t.n_bytes()
            rows, columns = t.shape[-2:]
            each = preset.used if len(t.shape) == 3 else 1
            flop += 2.0 * rows * columns * each * preset.canvas
        work[kernel] = n_bytes, flop
    return work


def kernels(launches: str, args: Any, limits: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the timing library, per step, largest first, with rates and their shares."""
    sums: dict[str, list[float]] = {}
    for line in launches.splitlines():
        n, ms, name = line.split("\t")
        known = re.search(r"\d([a-z_]+_kernel)", name)
        entry = sums.setdefault(known[1] if known else name, [0, 0])
        entry[0] += int(n)
        entry[1] += float(ms)
    steps = sums.get("draw_kernel", [1, 0])[0]  # launched once a step
    work = work_of(random_gguf.PRESETS[args.preset], args.type)
    if "hopper_matmul_kernel" in sums:  # and the other only has the routers
        work["hopper_matmul_kernel"] = work.pop("matmul_kernel")
    found = []
    for name, (n, ms) in sorted(sums.items(), key=lambda item: -item[1][1]):
        entry_: dict[str, Any] = {"kernel": name, "launches": n / steps, "ms": ms / steps}
        if name in work and ms > 0:
            n_bytes, flop = work[name]
            entry_["gb_per_s"] = n_bytes / (ms / steps) * 1e-6
            entry_["top_per_s"] = flop / (ms / steps) * 1e-9
            if limits.get("copy_gb_per_s"):
                entry_["share_of_copy"] = entry_["gb_per_s"] / limits["copy_gb_per_s"]
                entry_["share_of_int8"] = entry_["top_per_s"] / limits["int8_mma_top_per_s"]
        found.append(entry_)
    return found


def table(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# {found['device']}, {found['date']}, {found['preset']} {found['type']}", ""]
    lines += [f"Commit {found['commit']}.", ""] if found.get("commit") else []
    lines += [line for note in found.get("notes", []) for line in (note, "")]
    lines += ["| stage | outcome | s |", "| --- | --- | --- |"]
    for name, entry in found["stages"].items():
        lines.append(f"| {name} | {'ok' if entry['ok'] else 'failed'} | {entry['seconds']} |")
    if "limits" in found:
        rates = found["limits"]
        lines += [
            "",
            f"Copy {rates['copy_gb_per_s']:.0f} GB/s, read {rates['read_gb_per_s']:.0f} GB/s, "
            f"int8 mma {rates['int8_mma_top_per_s']:.0f} TOP/s, "
            f"bf16 mma {rates['bf16_mma_tflop_per_s']:.0f} TFLOP/s.",
        ]
    if "time" in found:
        timed = found["time"]
        step = timed["step_ms"]
        lines += [
            "",
            f"Step behind {timed['n_past']} tokens: median {step['median']:.2f} ms "
            f"({step['min']:.2f} to {step['max']:.2f}); prompt "
            f"{timed['prefill_tokens_per_s']:.0f} tokens/s; load {timed['load_s']:.1f} s.",
        ]
        if "memory_floor_ms" in timed:
            lines += [
                f"Reading the file once at the copy rate: {timed['memory_floor_ms']:.2f} ms; "
                f"the step takes {timed['times_memory_floor']:.2f} times that."
            ]
    if "contexts" in found:
        lines += ["", "| tokens before | cache | ms a step | prompt | tokens/s | |",
                  "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        for c in found["contexts"]:
            step_ = f"{c['step_ms']:.2f}" if "step_ms" in c else ""
            rate = f"{c['prefill_tokens_per_s']:.0f}" if "prefill_tokens_per_s" in c else ""
            note = gpu_more.describe_environment(c) or c.get("error", "")
            lines.append(f"| {c['n_past']} | {c['cache']} | {step_} | {c['n_prompt']} | {rate} | "
                         f"{note} |")  # fmt: skip
    if "profile" in found:
        lines += ["", "| kernel | launches a step | ms | GB/s | of copy | TOP/s | of int8 |",
                  "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        for k in found["profile"]:
            rates = ["", "", "", ""]
            if "gb_per_s" in k:
                copy, int8 = (
                    f"{k[s]:.0%}" if s in k else "" for s in ("share_of_copy", "share_of_int8")
                )
                rates = [f"{k['gb_per_s']:.0f}", copy, f"{k['top_per_s']:.0f}", int8]
            lines.append(f"| {k['kernel']} | {k['launches']:.1f} | {k['ms']:.3f} | "
                         f"{' | '.join(rates)} |")  # fmt: skip
    lines += gpu_more.lines(found)
    if "agree" in found:
        lines += ["", "| type | error of logits | same argmax |", "| --- | --- | --- |"]
        for kind, entry in found["agree"].items():
            lines.append(f"| {kind} | {entry['error']:.2g} | {entry['same_argmax']:.0%} |")
    return "\n".join(lines) + "\n"


def to_paste(found: dict[str, Any], earlier: dict[str, Any] | None) -> str:
    """A few lines that say what was measured, for an issue or a mail."""
    lines = [f"dgemma {found['commit']} on {found['device']}, {found['preset']} {found['type']}"]
    for name, entry in found["stages"].items():
        if not entry["ok"]:
            lines.append(f"{name} failed: {entry['error'].strip().splitlines()[-1][:150]}")
    if "time" in found:
        step, rate = found["time"]["step_ms"]["median"], found["time"]["prefill_tokens_per_s"]
        lines.append(f"step {step:.2f} ms, prompt {rate:.0f} tokens/s, {found['time']['backend']}")
        if earlier is not None:
            before = earlier["time"]["step_ms"]["median"]
            lines.append(f"step {step / before:.2f} of {before:.2f} ms on {earlier['date']}")
    for c in found.get("contexts", []):
        if "step_ms" in c:
            environment = gpu_more.describe_environment(c)
            how = f", {environment}" if environment else ""
            lines.append(f"behind {c['n_past']} ({c['cache']}{how}): {c['step_ms']:.2f} ms")
    other = found.get("types")
    for name, entry in other.items() if isinstance(other, dict) else ():
        if "step_ms" in entry:
            lines.append(f"{name}: {entry['step_ms']:.2f} ms, "
                         f"prompt {entry['prefill_tokens_per_s']:.0f} tokens/s")  # fmt: skip
    if "limits" in found:
        rates = found["limits"]
        lines.append(f"copy {rates['copy_gb_per_s']:.0f} GB/s, "
                     f"int8 mma {rates['int8_mma_top_per_s']:.0f} TOP/s")  # fmt: skip
    return "\n".join(lines)
