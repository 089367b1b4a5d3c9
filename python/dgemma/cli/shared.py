"""Options that several commands have, and what they load."""

from __future__ import annotations

import argparse
import resource
import sys
from typing import TYPE_CHECKING, Any

from .. import hub
from ..model import DiffusionGemma
from ..values import Sampling

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = Any


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is loaded."""
    group = parser.add_argument_group("model")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("-m", "--model", metavar="M", help="GGUF file")
    source.add_argument(
        "-hf",
        "--hf-repo",
        metavar="USER/REPO[:QUANT]",
        help="file of a Hugging Face repository, such as user/repo:Q4_K_M",
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        metavar="N",
        type=int,
        default=8192,
        help="tokens of context (default: %(default)s; 0: the model's own)",
    )
    group.add_argument(
        "-t", "--threads", metavar="N", type=int, default=0, help="default: one a physical core"
    )
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


def load_model(args: argparse.Namespace) -> DiffusionGemma:
    """The model that the options name."""
    path = args.model
    if path is None:
        repo, _, kind = args.hf_repo.partition(":")
        path = hub.download(repo, type=kind or None)
    llm = DiffusionGemma(
        path,
        n_ctx=args.ctx_size,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
        n_cpu_moe=args.n_cpu_moe,
        backend=args.backend,
        type_k=args.cache_type_k,
        type_v=args.cache_type_v,
        verbose=True,
    )
    if llm.info.backend_note:
        print(f"dgemma: {llm.info.backend_note}", file=sys.stderr)
    return llm


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How a canvas is denoised; the defaults are the file's own."""
    group = parser.add_argument_group("denoising (default: what the file says)")
    group.add_argument("--seed", metavar="N", type=int, help="default: another one each time")
    group.add_argument("--temperature", metavar="X", type=float, help="scales t-min and t-max")
    for name, kind in _SAMPLING.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", metavar="N" if kind is int else "X", type=kind
        )


_SAMPLING = {
    name: int if name in ("max_denoising_steps", "stability_threshold") else float
    for name in Sampling.__annotations__
}


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampling_options` that were given."""
    names = ["seed", "temperature", *_SAMPLING]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def peak_rss_bytes() -> int:
    """The most memory that this process has had, mapped weights included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
