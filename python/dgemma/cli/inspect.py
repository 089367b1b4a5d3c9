"""`dgemma inspect`: what a file is, what it needs, and whether it will run."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .._native import MAX_GPUS, Model
from ..errors import Error, OutOfMemoryError
from ..gguf_file import File, Tensor
from ..opening import open_as_generate_does
from ..sizes import size_text
from ..tensor_kinds import Kind, kind_of
from ..values import GpuPlan
from .common import Subparsers, add_common_options, print_json

CONTEXTS = (4096, 8192, 32768, 65536, 131072)
CACHE_TYPES = ("f16", "q8_0")
GIB = 1 << 30
CARDS = (8, 12, 16, 24)  # GiB
DRIVER = 600 << 20  # of a card's memory, what the driver and a CUDA context take


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser("inspect", help="say what a file is and what it needs")
    parser.add_argument("file", metavar="F", help="GGUF file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--gpu-memory",
        metavar="GIB[,GIB...]",
        type=_cards,
        help="say how it would be divided over GPUs with so many GiB free",
    )
    add_common_options(parser, "ctx_size", "json")
    parser.set_defaults(run=run)


def _cards(text: str) -> list[float]:
    sizes = [float(size) for size in text.split(",")]
    if not 1 <= len(sizes) <= MAX_GPUS or not all(0 < size < 1e6 for size in sizes):
        raise ValueError(text)  # argparse says which option
    return sizes


def run(args: argparse.Namespace) -> int:
    """Prints the description of a file."""
    found = describe(
        args.file,
        n_ctx=args.ctx_size,
        with_tensors=args.tensors or args.json,
        cards=args.gpu_memory or (),
    )
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found, args.tensors)))
    return 0


def describe(
    path: str, *, n_ctx: int, with_tensors: bool, cards: Sequence[float] = ()
) -> dict[str, Any]:
    """What the file holds. `runs` is False, with a `reason`, where the engine refuses it.

    `n_ctx`: the context, 0 the model's own, for which `session` says what one more of them takes,
    and `division` how the model is divided over GPUs with `cards` GiB free.
    """
    with File(path) as file:
        keys, tensors = file.keys, file.tensors
        types: Counter[str] = Counter()
        mix: dict[str, Counter[str]] = {kind.value: Counter() for kind in Kind}
        for tensor in tensors:
            types[tensor.type.name] += len(tensor.data)
            mix[kind_of(tensor.name).value][tensor.type.name] += len(tensor.data)
        found: dict[str, Any] = {
            "file": path,
            "bytes": file.n_bytes,
            "name": keys.get("general.name"),
            "architecture": keys.get("general.architecture"),
            "license": keys.get("general.license"),
            "n_tensors": len(tensors),
            "bytes_per_type": dict(types.most_common()),
            "mix": {kind: dict(sizes.most_common()) for kind, sizes in mix.items() if sizes},
            "bits_per_weight": _bits_per_weight(tensors),
            "imatrix": keys.get("quantize.imatrix.file"),
            "has_chat_template": "tokenizer.chat_template" in keys,
        }
        if with_tensors:
            found["tensors"] = [
                {"name": t.name, "type": t.type.name, "shape": t.shape, "bytes": len(t.data)}
                for t in tensors
            ]
    found.update(_as_model(path, n_ctx, cards))
    return found


def _bits_per_weight(tensors: list[Tensor]) -> float:
    """What a weight takes on average, everything in the file included."""
    n_weights = sum(tensor.n_rows * tensor.n_cols for tensor in tensors)
    return 8 * sum(len(tensor.data) for tensor in tensors) / max(n_weights, 1)


def _as_model(path: str, n_ctx: int, cards: Sequence[float]) -> dict[str, Any]:
    try:
        open_as_generate_does(path).close()
        model = Model(path, backend="cpu")
    except (Error, ValueError) as problem:
        return {"runs": False, "reason": str(problem)}
    with model:
        info = model.info
        asked = min(n_ctx or info.context_length, info.context_length)
        sizes = sorted({n for n in CONTEXTS if n < info.context_length} | {info.context_length})
        memory = []
        for size in sizes:
            need = model.memory(n_ctx=size)
            memory.append({"n_ctx": size, **vars(need), "total": need.weights + need.session})
        return {
            "runs": True,
            "model": {
                name: vars(value) if name == "sampling" else value
                for name, value in vars(info).items()
                if not name.startswith("backend")
            },
            "memory": memory,
            "session": {"n_ctx": asked, "bytes": model.memory(n_ctx=asked).session},
            "gpu": _on_gpus(model, sizes),
            "division": _division(model, cards, asked) if cards else None,
            "machine_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        }


def _sums(plan: GpuPlan) -> dict[str, Any]:
    return {name: value for name, value in vars(plan).items() if name != "gpus"}


def _on_gpus(model: Model, contexts: list[int]) -> list[dict[str, Any]]:
    """For each context and cache type: what the whole model takes on a GPU, what cards can hold."""
    found = []
    for n_ctx in contexts:
        for kind in CACHE_TYPES:
            session: dict[str, Any] = {"n_ctx": n_ctx, "type_k": kind, "type_v": kind}
            whole = model.gpu_plan(n_gpu_layers=model.info.n_layers, **session)
            entry = {"n_ctx": n_ctx, "cache_type": kind, **_sums(whole), "cards": {}}
            for card in CARDS:
                try:
                    plan = model.gpu_plan(card * GIB - DRIVER, **session)
                except OutOfMemoryError:
                    entry["cards"][card] = None
                else:
                    entry["cards"][card] = _sums(plan)
            found.append(entry)
    return found


def _division(model: Model, cards: Sequence[float], n_ctx: int) -> dict[str, Any]:
    try:
        plan = model.gpu_plan([int(card * GIB) for card in cards], n_ctx=n_ctx)
    except OutOfMemoryError as problem:
        return {"n_ctx": n_ctx, "fits": False, "reason": str(problem)}
    return {"n_ctx": n_ctx, "fits": True, **asdict(plan)}


def _division_lines(division: dict[str, Any], n_layers: int) -> list[str]:
    lines = [f"  divided, with a context of {division['n_ctx']:,}:"]
    if not division["fits"]:
        return [*lines, f"    {division['reason']}"]
    first = n_layers - division["n_gpu_layers"]
    if first or division["n_cpu_moe"]:
        lines.append(f"    CPU: {first} layers, and the experts of {division['n_cpu_moe']}")
    for number, share in enumerate(division["gpus"]):
        what = "the embedding and " if number == 0 else ""
        lines.append(
            f"    GPU {number}: {what}{share['n_layers']} layers, {size_text(share['total'])} of "
            f"{size_text(share['available'])}"
        )
    return lines


def _split_text(plan: dict[str, int] | None, n_layers: int) -> str:
    if plan is None:
        return "no"
    if plan["n_gpu_layers"] < n_layers:
        return f"-ngl {plan['n_gpu_layers']}, no experts"
    return f"--n-cpu-moe {plan['n_cpu_moe']}" if plan["n_cpu_moe"] else "all"


def _gpu_lines(found: dict[str, Any]) -> list[str]:
    lines = ["  GPU memory, weights + cache + scratch + reserve, and what fits cards of these GiB:"]
    cards = "".join(f"{card:>18}" for card in CARDS)
    lines.append(f"    {'context':>15} {'cache':>5} {'all of it':>10}{cards}")
    for plan in found["gpu"]:
        splits = (_split_text(plan["cards"][card], found["model"]["n_layers"]) for card in CARDS)
        lines.append(
            f"    {plan['n_ctx']:>15,} {plan['cache_type']:>5} {size_text(plan['total']):>10}"
            + "".join(f"{split:>18}" for split in splits)
        )
    return lines


def _sizes(bytes_per_type: dict[str, int]) -> str:
    return ", ".join(f"{name} {size_text(n)}" for name, n in bytes_per_type.items())


def _lines(found: dict[str, Any], tensors: bool) -> list[str]:
    lines = [
        f"{found['name'] or found['file']}: {found['architecture']}, {size_text(found['bytes'])}, "
        f"{found['n_tensors']} tensors",
        f"  {found['bits_per_weight']:.2f} bits a weight: {_sizes(found['bytes_per_type'])}",
    ]
    for kind, sizes in found["mix"].items():
        lines.append(f"    {kind.replace('_', ' '):<18} {_sizes(sizes)}")
    if found["imatrix"]:
        lines.append(f"  encoded with the importance matrix {found['imatrix']}")
    if found["runs"]:
        model = found["model"]
        lines += [
            f"  {model['n_parameters'] / 1e9:.4g} billion weights; {model['n_layers']} layers, "
            f"{model['n_sliding_layers']} of them with a window of {model['sliding_window']}; "
            f"{model['n_experts']} experts, {model['n_experts_used']} used",
            f"  vocabulary {model['n_vocab']:,}, canvas {model['canvas_length']}, "
            f"context {model['context_length']:,}",
            "  memory, weights + cache + scratch:",
        ]
        for need in found["memory"]:
            fits = "" if need["total"] <= found["machine_bytes"] else ", more than this machine has"
            lines.append(
                f"    context {need['n_ctx']:>7,}: {size_text(need['weights'])} + "
                f"{size_text(need['cache'])} + {size_text(need['scratch'])} = "
                f"{size_text(need['total'])}{fits}"
            )
        session = found["session"]
        lines.append(
            f"  each further session of a server, context {session['n_ctx']:,}: "
            f"{size_text(session['bytes'])}"
        )
        lines += _gpu_lines(found)
        if found["division"]:
            lines += _division_lines(found["division"], model["n_layers"])
        if model["file_note"]:
            lines.append(f"  note: {model['file_note']}")
        lines.append("  runs here")
    else:
        lines.append(f"  does not run here: {found['reason']}")
    if tensors:
        for tensor in found["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            lines.append(
                f"  {tensor['name']:<40} {tensor['type']:>8} {shape:>22} {tensor['bytes']:>14,}"
            )
    return lines
