"""Which model a command loads and how it denoises: options of all commands that answer."""

from __future__ import annotations

import argparse
import resource
import sys
from typing import Any

from ..generation.declared import RequestOptions, SamplingOptions, declared
from ..model import DiffusionGemma
from ..opening import with_its_text
from .common import Subparsers, add_common_options
from .obtain import obtain


def add_model_options(parser: argparse.ArgumentParser, *, source: bool = True) -> None:
    """Which model, and how it is loaded; `source`: with -m and -hf."""
    group = parser.add_argument_group("model")
    if source:
        named = group.add_mutually_exclusive_group(required=True)
        named.add_argument("-m", "--model", metavar="M", help="GGUF file")
        named.add_argument(
            "-hf",
            "--hf-repo",
            metavar="USER/REPO[:TYPE]",
            help="file of a Hugging Face repository, such as user/repo:Q4_K_M",
        )
    add_common_options(group, "ctx_size", "threads", "progress")
    group.add_argument("--backend", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument(
        "-ngl",
        "--n-gpu-layers",
        metavar="N",
        type=_layers,
        default="auto",
        help="the last N layers are kept on the GPU (default: auto, as many as fit)",
    )
    group.add_argument(
        "--n-cpu-moe",
        metavar="N",
        type=int,
        default=0,
        help="the experts of the last N layers stay on the CPU",
    )
    group.add_argument(
        "--device",
        metavar="GPU",
        help="number, uuid or part of the name of the GPU, or several, separated by commas "
        "(default: the one with the most free memory; `dgemma doctor` lists them)",
    )
    group.add_argument(
        "-ts",
        "--tensor-split",
        metavar="3,1",
        help="how layers are divided over several GPUs: proportions, or auto, by free memory "
        "(default: over the fewest)",
    )
    for letter, what in (("k", "keys"), ("v", "values")):
        group.add_argument(
            f"-ct{letter}",
            f"--cache-type-{letter}",
            choices=["f32", "f16", "bf16", "q8_0"],
            default="f16",
            help=f"type of the cached {what} (default: %(default)s)",
        )


def _layers(text: str) -> int | str:
    return text if text == "auto" else int(text)


def model_path(args: argparse.Namespace) -> str:
    """The file that -m or -hf names, downloaded where it is not there yet."""
    if args.model is not None:
        return str(args.model)
    return obtain(args.hf_repo, threads=args.threads)


def load_model(args: argparse.Namespace, path: str | None = None) -> DiffusionGemma:
    """The model that the options name, or the one at `path`.

    What `dgemma inspect` says does not run is refused here, whatever the command needs of it.
    """
    llm = DiffusionGemma(
        path or model_path(args),
        n_ctx=args.ctx_size,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
        n_cpu_moe=args.n_cpu_moe,
        device=args.device,
        tensor_split=args.tensor_split,
        backend=args.backend,
        type_k=args.cache_type_k,
        type_v=args.cache_type_v,
        verbose=True,
        warn_of_unused_gpu=False,  # the note says the same
    )
    if llm.info.backend_note:
        print(f"dgemma: {llm.info.backend_note}", file=sys.stderr)
    return with_its_text(llm)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How a canvas is denoised; the defaults are the file's own."""
    group = parser.add_argument_group("denoising (default: what the file says)")
    _add_declared(group, "seed", "temperature", *declared(SamplingOptions))


def add_length_options(parser: argparse.ArgumentParser) -> None:
    """Where an answer ends."""
    _add_declared(parser, "max_tokens")


def _add_declared(group: Any, *names: str) -> None:
    known, short = declared(RequestOptions), {"max_tokens": ("-n",)}
    for name in names:
        found = known[name]
        group.add_argument(
            *short.get(name, ()),
            f"--{name.replace('_', '-')}",
            metavar=found.option.metavar,
            type=found.kind,
            help=found.option.help,
        )


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """The declared options that were given, checked: before a model is loaded."""
    found = {}
    for name, option in declared(RequestOptions).items():
        value = option.check(getattr(args, name, None))
        if value is not None:
            found[name] = value
    return found


def peak_rss_bytes() -> int:
    """The most memory that this process has had, mapped weights included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


__all__ = [
    "Subparsers",
    "add_length_options",
    "add_model_options",
    "add_sampling_options",
    "load_model",
    "model_path",
    "peak_rss_bytes",
    "request_options",
]
