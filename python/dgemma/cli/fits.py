"""What of a file fits this machine, at which contexts, and how fast a step can be at best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .._native import Model
from ..errors import OutOfMemoryError
from ..gguf_file import File
from ..sizes import size_text
from ..tensor_kinds import Kind, kind_of
from ..values import GpuPlan, ModelInfo

CONTEXTS = (4096, 8192, 32768, 65536, 131072)
_EXPERTS = (Kind.EXPERTS_GATE_UP, Kind.EXPERTS_DOWN)


def fits_of(path: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """For each context where the file would run; `found` is what `doctor.examine` has found.

    GPUs are those of `found["cuda"]`, the first of which is the one that is used by itself.
    """
    with Model(path, backend="cpu") as model:
        info = model.info
        contexts = sorted({n for n in CONTEXTS if n < info.context_length} | {info.context_length})
        return {
            "path": path,
            "bytes": info.weight_bytes,
            "least_cpu_step_ms": least_step_ms(
                info.weight_bytes, _active_weights(path, info), info.canvas_length, found["limits"]
            ),
            "contexts": [_at(model, n_ctx, found) for n_ctx in contexts],
        }


def _active_weights(path: str, info: ModelInfo) -> float:
    """Weights that a token meets: all but the experts that it is not sent to."""
    with File(path) as file:
        experts = sum(t.n_rows * t.n_cols for t in file.tensors if kind_of(t.name) in _EXPERTS)
    return info.n_parameters - experts * (1 - info.n_experts_used / max(info.n_experts, 1))


def least_step_ms(
    n_bytes: float, active_weights: float, canvas: int, limits: Mapping[str, float]
) -> float:
    """Computed: a step reads nearly all experts once, and multiplies each token with what it meets.

    Two operations a weight, at the rates that were measured; whichever takes longer.
    """
    reading = n_bytes / (1e9 * limits["read_gb_per_s"])
    rate = limits["int8_gop_per_s"] or limits["f32_gflop_per_s"]
    return 1e3 * max(reading, 2 * active_weights * canvas / (1e9 * rate))


def _at(model: Model, n_ctx: int, found: Mapping[str, Any]) -> dict[str, Any]:
    need = model.memory(n_ctx=n_ctx)
    total = need.weights + need.session
    plan = _plan(model, n_ctx, found["cuda"])
    return {
        "n_ctx": n_ctx,
        "cpu_bytes": total,
        "fits_cpu": total <= found["machine"]["available"],
        "gpu": None if plan is None else asdict(plan),
    }


def _plan(model: Model, n_ctx: int, cuda: Mapping[str, Any]) -> GpuPlan | None:
    """As loading would divide it: the GPU with the most free memory, or if need be all of them."""
    gpus = [gpu["free_bytes"] for gpu in cuda.get("gpus", []) if not gpu["obstacle"]]
    if not gpus:
        return None
    for cards in ([max(gpus)], sorted(gpus, reverse=True)):
        try:
            plan = model.gpu_plan(cards, n_ctx=n_ctx)
        except OutOfMemoryError:
            continue
        if plan.n_cpu_moe == 0 or len(cards) == len(gpus):
            return plan
    return None


def lines_of(fits: Mapping[str, Any]) -> list[str]:
    """The same as text."""
    lines = [
        f"{fits['path']}, {size_text(fits['bytes'])}: a step on the CPU takes "
        f"{fits['least_cpu_step_ms']:.0f} ms at best (computed from the rates above)"
    ]
    for entry in fits["contexts"]:
        cpu = "fits" if entry["fits_cpu"] else "does not fit"
        lines.append(
            f"  context {entry['n_ctx']:>7,}: {_on_gpus(entry['gpu'])}"
            f"CPU alone: {size_text(entry['cpu_bytes'])}, {cpu}"
        )
    return lines


def _on_gpus(plan: Mapping[str, Any] | None) -> str:
    if plan is None:
        return ""
    shares: Sequence[Mapping[str, Any]] = [s for s in plan["gpus"] if s["total"]]
    sizes = " + ".join(size_text(share["total"]) for share in shares)
    what = "all of it" if not plan["n_cpu_moe"] else f"--n-cpu-moe {plan['n_cpu_moe']}"
    gpus = "the GPU" if len(shares) == 1 else f"{len(shares)} GPUs"
    return f"on {gpus} {what}, {sizes}; "
