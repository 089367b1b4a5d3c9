"""From a checkpoint folder to a GGUF file, in one pass."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import LlamaFileType
from gguf.gguf_writer import GGUFValue
from tqdm import tqdm

from . import encode
from .config import read_config
from .errors import from_os_error
from .importance import Importance
from .lora import Adapter
from .memory import CONTEXT, needed
from .metadata import (
    ParameterCounts,
    checkpoint_keys,
    folder_name,
    imatrix_keys,
    read_overrides,
)
from .policy import DEFAULT_MIX, FILE_TYPES, Policy, Type, make_policy
from .quantized import read_sources
from .safetensors_file import Checkpoint
from .sources import n_elements
from .tensors import LeftOut, map_tensors
from .writer import TensorInfo, Writer, shard_paths, size_text, split


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the new file."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    fallback_from: str | None = None  # the type asked for, where the row width does not fit it


@dataclass(frozen=True)
class Report:
    """What a conversion wrote, or would write."""

    files: list[str]
    outtype: str
    tensors: list[TensorReport]
    left_out: list[LeftOut] = field(default_factory=list)
    n_parameters: int = 0
    memory_bytes: int | None = None  # about what running it takes, with memory.CONTEXT tokens
    seconds: float = 0.0
    dry_run: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors of each type."""
        return dict(Counter(tensor.type for tensor in self.tensors))

    @property
    def fallbacks(self) -> dict[tuple[str, str], list[TensorReport]]:
        """Tensors whose width does not fit the type asked for, by (asked for, used)."""
        found: dict[tuple[str, str], list[TensorReport]] = {}
        for tensor in self.tensors:
            if tensor.fallback_from is not None:
                found.setdefault((tensor.fallback_from, tensor.type), []).append(tensor)
        return found

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "n_bytes": self.n_bytes, "types": self.types}


def convert(
    src: Path,
    outfile: Path | None = None,
    outtype: str = DEFAULT_MIX,
    *,
    token_embedding_type: str | None = None,
    tensor_types: Sequence[str] = (),
    threads: int = 0,
    model_name: str | None = None,
    metadata: Path | None = None,
    imatrix: Path | None = None,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    split_max_size: int = 0,
    force: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Report:
    """Converts the checkpoint folder `src` to the GGUF file `outfile`.

    outfile         None: a name made of the model's and the type's, in the working directory; a
                    folder: that name in it.
    outtype         one of `policy.MIXES`.
    tensor_types    exceptions, "REGEX=TYPE"; the first that is found in a tensor's name decides.
    threads         0: one a physical core.
    metadata        JSON file with `general.*` keys that come before those of the model card.
    imatrix         GGUF file with an importance matrix.
    lora            folder of a LoRA adapter to merge, multiplied by lora_scale.
    split_max_size  bytes of a shard; 0: one file.
    dry_run         only says what would be written.
    progress        shows a bar on standard error, if that is a terminal.

    Raises ConvertError. An existing file is replaced only with `force`, and only once the new one
    is whole. Memory does not grow with the model.
    """
    begin = time.perf_counter()
    policy = make_policy(outtype, tensor_types, token_embedding_type)
    importance = None if imatrix is None else Importance(imatrix)
    general = {"name": folder_name(src)}
    if metadata is not None:
        general |= read_overrides(metadata)
    if model_name:
        general["name"] = model_name
    try:
        with ExitStack() as stack:
            checkpoint = stack.enter_context(Checkpoint(src))
            checks = [checkpoint.check_unchanged]
            config = read_config(src)
            sources = read_sources(checkpoint)
            if lora is not None:
                adapter = stack.enter_context(Adapter(lora, lora_scale))
                checks.append(adapter.check_unchanged)
                sources = replace(sources, tensors=adapter.merge(sources.tensors))
            mapped = map_tensors(config, checkpoint, sources)
            left_out = mapped.left_out
            if lora is not None and adapter.left_out:
                n_bytes = sum(tensor.n_bytes for tensor in adapter.left_out)
                left_out = [*left_out, LeftOut("adapted vision", len(adapter.left_out), n_bytes)]
            steps = encode.plan(mapped.tensors, policy, importance)
            encode.check_types(steps)
            infos = [info for step in steps for info in step.infos]
            counts = ParameterCounts(
                config.experts, ((tensor.name, tensor.source.shape) for tensor in mapped.tensors)
            )
            target = target_path(outfile, general["name"], outtype)
            keys = checkpoint_keys(src, config, file_type(policy, steps), counts, general)
            if importance is not None:
                keys.update(imatrix_keys(importance))
            paths = shard_paths(target, len(split(infos, split_max_size)))
            if not dry_run:
                write(
                    steps,
                    keys,
                    target,
                    force,
                    split_max_size,
                    threads,
                    progress,
                    checks,
                )
    except OSError as error:
        raise from_os_error(error, "converting") from error
    return Report(
        files=[str(path) for path in paths],
        outtype=outtype,
        tensors=tensor_reports(steps),
        left_out=left_out,
        n_parameters=counts.total,
        memory_bytes=needed(keys, sum(info.n_bytes for info in infos)),
        seconds=time.perf_counter() - begin,
        dry_run=dry_run,
    )


def write(
    steps: Sequence[encode.Step],
    keys: Mapping[str, GGUFValue],
    target: Path,
    force: bool,
    split_max_size: int,
    threads: int,
    progress: bool,
    checks: Sequence[Callable[[], object]] = (),
) -> None:
    """Writes the file(s); `checks` are called before they are made whole, and may raise."""
    infos: list[TensorInfo] = [info for step in steps for info in step.infos]
    n_bytes = {step.tensor.name: step.tensor.n_bytes for step in steps}
    with (
        Writer(target, keys, infos, force=force, split_max_size=split_max_size) as writer,
        tqdm(
            total=sum(n_bytes.values()),
            unit="B",
            unit_scale=True,
            desc=target.name,
            # None asks tqdm to stay silent unless standard error is a terminal.
            disable=None if progress else True,
            file=sys.stderr,
        ) as bar,
    ):
        encode.run(steps, writer, threads, bar.update)
        for check in checks:
            check()
        writer.commit()


def tensor_reports(steps: Sequence[encode.Step]) -> list[TensorReport]:
    """What each step writes."""
    reports = []
    for step in steps:
        for info in step.infos:
            fell_back = info is step.tensor and info.type is not step.wanted
            reports.append(
                TensorReport(
                    info.name,
                    info.shape,
                    info.type.name.lower(),
                    info.n_bytes,
                    step.wanted.name.lower() if fell_back else None,
                )
            )
    return reports


def file_type(policy: Policy, steps: Sequence[encode.Step]) -> LlamaFileType:
    """`general.file_type`: the mix's, or that of the type which most weights have."""
    if policy.mix.default is not None:
        return policy.mix.file_type
    weights: Counter[Type] = Counter()
    for step in steps:
        weights[step.tensor.type] += n_elements(step.tensor.shape)
    most = weights.most_common(1)[0][0]
    return FILE_TYPES.get(most, LlamaFileType.GUESSED)


def target_path(outfile: Path | None, name: str, outtype: str) -> Path:
    """Where to write: `outfile`, or a name that says model and type."""
    if outfile is not None and not outfile.is_dir():
        return outfile
    safe = name.replace("/", "-").replace(" ", "-")
    return (outfile or Path()) / f"{safe}-{outtype.upper()}.gguf"


def describe(report: Report) -> list[str]:
    """The report as lines for people."""
    verb = "would write" if report.dry_run else "wrote"
    types = ", ".join(f"{n} {name}" for name, n in sorted(report.types.items()))
    lines = [
        f"{verb} {', '.join(report.files)}: {size_text(report.n_bytes)}, "
        f"{report.n_parameters / 1e6:,.1f} million weights, tensors: {types}"
    ]
    if report.memory_bytes is not None:
        lines.append(
            f"to run it: about {size_text(report.memory_bytes)} of memory, or of GPU memory, with "
            f"a context of {CONTEXT:,}"
        )
    for (wanted, used), tensors in report.fallbacks.items():
        widths = sorted({tensor.shape[-1] for tensor in tensors})
        lines.append(
            f"{len(tensors)} tensors are {used} where {wanted} was asked for: rows of "
            f"{', '.join(map(str, widths))} are not whole blocks (first: {tensors[0].name})"
        )
    for left in report.left_out:
        lines.append(
            f"left out: {left.n_tensors} tensors of {left.what} ({size_text(left.n_bytes)})"
        )
    return lines
