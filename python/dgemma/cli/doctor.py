"""`dgemma doctor`: what this machine has, what of it is used, and why not the rest."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .. import machine
from .._native import backend_check, list_gpus, measure_limits, version
from ..errors import BackendError
from ..sizes import size_text
from .common import Subparsers, add_common_options, print_json
from .fits import fits_of, least_step_ms, lines_of

# Files of the released model, as `dgemma convert` makes them, and what a step of it takes.
RELEASED = {"q4_0": 14.4e9, "iq4_xs_l": 15.0e9, "q4_k_m": 15.9e9, "q8_0": 26.9e9, "bf16": 50.5e9}
ACTIVE_WEIGHTS = 3.8e9  # that a token meets
CANVAS = 256
SESSION = 1.2e9  # cache and scratch at 8,192 tokens: `dgemma inspect` says it exactly
LEAST_CAPABILITY = 8.0  # Ampere


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has and what is used of it",
        description="Looks at processor, memory, driver and GPUs, measures for about a second, and "
        "says what will be used, why not the rest, and what to do. Put it into bug reports.",
    )
    parser.add_argument(
        "-m", "--model", metavar="M", help="GGUF file: say at which contexts it fits"
    )
    add_common_options(parser, "threads", "json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was found."""
    found = examine(args.threads)
    found["file"] = fits_of(args.model, found) if args.model else None
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def examine(n_threads: int = 0) -> dict[str, Any]:
    """All that is known of this machine and this installation."""
    here, driver = machine.describe(), machine.driver()
    limits = measure_limits(n_threads)
    found: dict[str, Any] = {
        "dgemma": version(),
        "python": platform.python_version(),
        "machine": asdict(here),
        "cpu_backend": backend_check("cpu").name,
        "limits": vars(limits),
        "driver": None if driver is None else asdict(driver),
        "nvidia_card": machine.has_nvidia_card(),
        "environment": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if name.startswith("DGEMMA_") or name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
        },
    }
    try:
        gpus = [asdict(gpu) for gpu in list_gpus()]
    except BackendError:
        gpus = []
    try:
        gpu = backend_check("cuda")
        found["cuda"] = {"usable": True, "free": gpu.free_bytes, "total": gpu.total_bytes}
    except BackendError as problem:
        found["cuda"] = {"usable": False, "reason": str(problem)}
    found["cuda"]["gpus"] = gpus
    found["advice"] = advice(found)
    found["fits"] = fits(found)
    return found


def advice(found: Mapping[str, Any]) -> list[str]:
    """What stands between this machine and a GPU, and what to do about it."""
    if found["cuda"]["usable"]:
        return []
    reason = found["cuda"]["reason"]
    gpus = (found["driver"] or {}).get("gpus", [])
    visible = found["environment"].get("CUDA_VISIBLE_DEVICES")
    able = [gpu for gpu in gpus if float(gpu["capability"]) >= LEAST_CAPABILITY]
    if not gpus and found["machine"]["wsl"] and found["driver"] is None:
        return [
            "no NVIDIA driver is seen from WSL: install the driver on Windows, not inside of "
            "WSL, then run `wsl --update` and `wsl --shutdown`"
        ]
    if found["driver"] is None and found["nvidia_card"]:
        return ["an NVIDIA card is there, but no driver: install NVIDIA's driver and restart"]
    if not gpus:
        return ["no NVIDIA GPU was found: answers are made by the CPU"]
    if not able:
        names = ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in gpus)
        return [f"compute capability 8.0 (Ampere) or later is needed; there is {names}"]
    if visible is not None and visible.strip() in ("", "-1"):
        return [
            f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs: `unset CUDA_VISIBLE_DEVICES`",
        ]
    if "no CUDA backend" in reason:
        return [
            "this installation was made without CUDA: pip install 'dgemma[cuda]', or install "
            "again with a CUDA toolkit there (docs/cuda.md)"
        ]
    if "update the driver" in reason:
        return [f"the driver {found['driver']['version']} is too old for this build: {reason}"]
    if "no kernel image" in reason or "architecture" in reason:
        return [
            f"this build has no code for compute capability {able[0]['capability']}: build it for "
            "this card with `make cuda`"
        ]
    return [reason]


def fits(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For files of the released model: where they fit, and the least milliseconds of a step."""
    memory, gpu = found["machine"]["available"], found["cuda"]
    limits = found["limits"]
    entries = []
    for name, size in RELEASED.items():
        on_gpu = gpu["usable"] and size + SESSION <= gpu["free"]
        if on_gpu:
            place = "GPU"
        elif size + SESSION > memory:
            place = "no"
        else:
            place = "GPU and CPU" if gpu["usable"] else "CPU"
        entries.append(
            {
                "type": name,
                "bytes": int(size),
                "place": place,
                "least_cpu_step_ms": least_step_ms(size, ACTIVE_WEIGHTS, CANVAS, limits)
                if place == "CPU"
                else None,
            }
        )
    return entries


def _lines(found: Mapping[str, Any]) -> list[str]:
    here, limits, cuda = found["machine"], found["limits"], found["cuda"]
    lines = [
        f"dgemma      {found['dgemma']}, Python {found['python']}",
        f"system      {here['system']}{', WSL' if here['wsl'] else ''}",
        f"processor   {here['cpu']}, {here['logical_cpus']} logical; {found['cpu_backend']}",
        f"memory      {size_text(here['total'])}, {size_text(here['available'])} available; reads "
        f"{limits['read_gb_per_s']:.1f} GB/s",
        f"arithmetic  int8 {limits['int8_gop_per_s']:.0f} GOP/s, "
        f"bf16 {limits['bf16_gflop_per_s']:.0f}, f32 {limits['f32_gflop_per_s']:.0f} GFLOP/s",
    ]
    driver = found["driver"]
    if driver is None:
        lines.append("driver      none of NVIDIA's")
    else:
        lines.append(f"driver      NVIDIA {driver['version']}, CUDA up to {driver['cuda']}")
        numbers = {gpu["uuid"]: gpu["number"] for gpu in cuda["gpus"]}
        lines += [_gpu_line(gpu, numbers.get(gpu["uuid"])) for gpu in driver["gpus"]]
    if cuda["usable"]:
        lines.append(
            f"GPU used    {size_text(cuda['free'])} of {size_text(cuda['total'])} are free"
        )
    else:
        lines.append(f"GPU used    none: {cuda['reason']}")
    lines += [f"{name}={value}" for name, value in found["environment"].items()]
    lines += [f"  -> {text}" for text in found["advice"]]
    if found.get("file"):
        return [*lines, "", *lines_of(found["file"])]
    return [*lines, "", *_fit_lines(found["fits"])]


def _gpu_line(gpu: Mapping[str, Any], number: int | None) -> str:
    """`number`: what --device takes, which need not be the driver's; None where CUDA hides it."""
    name = f"--device {number}" if number is not None else "not shown"
    return (
        f"{name:<11} {gpu['name']}, {size_text(gpu['free_bytes'])} of "
        f"{size_text(gpu['total_bytes'])} free, compute capability {gpu['capability']}, "
        f"{gpu['uuid']}"
    )


def _fit_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["the released model, with a context of 8,192 tokens:"]
    for entry in entries:
        text = f"  {entry['type']:<9} {size_text(entry['bytes']):>9}  {_PLACES[entry['place']]}"
        if entry["least_cpu_step_ms"] is not None:
            text += f", {entry['least_cpu_step_ms']:.0f} ms a step at best (computed)"
        lines.append(text)
    return lines


_PLACES = {
    "GPU": "fits the GPU",
    "GPU and CPU": "fits GPU and CPU together",
    "CPU": "fits the CPU's memory",
    "no": "does not fit",
}
