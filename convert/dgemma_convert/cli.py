"""The subcommands `convert`, `quantize` and `synth` of the program `dgemma`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dgemma.cli.common import Subparsers, add_common_options, print_json

from .conversion import convert
from .hub import download
from .policy import DEFAULT_MIX, MIXES, TYPES
from .production import Report, describe
from .requantize import BEST, quantize
from .synth import PRESETS, synthesize
from .target_size import parse_target
from .writer import parse_size

TYPE_NAMES = " ".join(t.name.lower() for t in TYPES)


def add_convert_parser(subparsers: Subparsers) -> None:
    """Registers `dgemma convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="make a GGUF file from a checkpoint",
        description="Converts a DiffusionGemma checkpoint folder (config.json, *.safetensors, "
        "tokenizer.json) to a GGUF file, in one pass.",
    )
    parser.add_argument("src", metavar="SRC", help="checkpoint folder")
    parser.add_argument(
        "--remote", action="store_true", help="SRC is a repository of the Hugging Face hub"
    )
    parser.add_argument(
        "--outtype",
        metavar="T",
        default=DEFAULT_MIX,
        choices=list(MIXES),
        type=str.lower,
        help=f"{' '.join(MIXES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--lora", metavar="DIR", type=Path, help="LoRA adapter to merge: its folder or its file"
    )
    parser.add_argument(
        "--lora-scale", metavar="S", type=float, default=1.0, help="its strength (default: 1)"
    )
    parser.add_argument("--model-name", metavar="NAME", help="general.name of the file")
    parser.add_argument(
        "--metadata",
        metavar="F",
        type=Path,
        help="JSON file with general.* keys that come before the model card's",
    )
    parser.add_argument(
        "--outfile",
        metavar="F",
        type=Path,
        help="file to write, or a folder for it (default: NAME-TYPE.gguf here)",
    )
    _add_type_options(parser)
    parser.set_defaults(run=_run_convert)


def _add_type_options(parser: argparse.ArgumentParser) -> None:
    """What `convert` and `quantize` have in common."""
    parser.add_argument(
        "--tensor-type",
        metavar="REGEX=T",
        action="append",
        default=[],
        help=f"another type for tensors with such names; repeatable; T: {TYPE_NAMES}",
    )
    parser.add_argument(
        "--imatrix", metavar="F", type=Path, help="importance matrix (dgemma imatrix)"
    )
    parser.add_argument(
        "--token-embedding-type", metavar="T", help="another type for token_embd.weight"
    )
    parser.add_argument(
        "--split-max-size", metavar="N", help="write shards of at most this size, such as 4G"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what each tensor would become"
    )
    add_common_options(parser, "threads", "force", "json", "progress")


def _run_convert(args: argparse.Namespace) -> int:
    report = convert(
        download(args.src) if args.remote else Path(args.src),
        args.outfile,
        args.outtype,
        token_embedding_type=args.token_embedding_type,
        tensor_types=args.tensor_type,
        imatrix=args.imatrix,
        threads=args.threads,
        model_name=args.model_name,
        metadata=args.metadata,
        lora=args.lora,
        lora_scale=args.lora_scale,
        split_max_size=parse_size(args.split_max_size) if args.split_max_size else 0,
        force=args.force,
        dry_run=args.dry_run,
    )
    return _print(report, args.json)


def _print(report: Report, as_json: bool) -> int:
    if as_json:
        print_json(report.to_json())
        return 0
    if report.dry_run:
        for tensor in report.tensors:
            shape = " x ".join(map(str, tensor.shape))
            print(f"{tensor.name:<40} {shape:>22} {tensor.type:>8} {tensor.n_bytes:>14,}")
    print("\n".join(describe(report)))
    return 0


def add_quantize_parser(subparsers: Subparsers) -> None:
    """Registers `dgemma quantize`."""
    parser = subparsers.add_parser(
        "quantize",
        help="make a GGUF file of other types from a GGUF file",
        description="Writes the model of a GGUF file in other types.",
    )
    parser.add_argument("src", metavar="IN", type=Path, help="GGUF file, or its first shard")
    parser.add_argument("outfile", metavar="OUT", type=Path, help="file to write")
    parser.add_argument(
        "outtype",
        metavar="T",
        choices=[*MIXES, BEST],
        type=str.lower,
        help=f"{' '.join(MIXES)}; {BEST}, with --target-size",
    )
    parser.add_argument(
        "--target-size",
        metavar="N",
        help=f"with T {BEST}: the most that the file may have, such as 11.5GiB",
    )
    parser.add_argument(
        "--plot", metavar="F", type=Path, help="draw divergence by size for --target-size, as SVG"
    )
    parser.add_argument(
        "--allow-requantize",
        action="store_true",
        help="also where a tensor is quantized already, adding up two errors",
    )
    _add_type_options(parser)
    parser.set_defaults(run=_run_quantize)


def _run_quantize(args: argparse.Namespace) -> int:
    report = quantize(
        args.src,
        args.outfile,
        args.outtype,
        target_size=parse_target(args.target_size) if args.target_size else 0,
        plot=args.plot,
        allow_requantize=args.allow_requantize,
        token_embedding_type=args.token_embedding_type,
        tensor_types=args.tensor_type,
        imatrix=args.imatrix,
        threads=args.threads,
        split_max_size=parse_size(args.split_max_size) if args.split_max_size else 0,
        force=args.force,
        dry_run=args.dry_run,
    )
    return _print(report, args.json)


def add_synth_parser(subparsers: Subparsers) -> None:
    """Registers `dgemma synth`."""
    parser = subparsers.add_parser(
        "synth",
        help="make a GGUF file of real size with random weights",
        description="Writes a model with random, well-conditioned weights, to measure a machine "
        "before downloading a real one.",
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="26b-a4b", help="sizes (default: %(default)s)"
    )
    parser.add_argument(
        "--type",
        dest="outtype",
        metavar="T",
        choices=list(MIXES),
        type=str.lower,
        default="q4_0",
        help=f"{' '.join(MIXES)} (default: %(default)s)",
    )
    parser.add_argument("--outfile", metavar="F", type=Path, required=True, help="file to write")
    add_common_options(parser, "seed", "threads", "force", "json", "progress")
    parser.set_defaults(run=_run_synth)


def _run_synth(args: argparse.Namespace) -> int:
    report = synthesize(
        args.preset,
        args.outfile,
        args.outtype,
        seed=args.seed,
        threads=args.threads,
        force=args.force,
    )
    return _print(report, args.json)
