"""The way of all new files: from tensors that can be read to a file that is written and checked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from dgemma.errors import Error
from dgemma.importance import Importance
from dgemma.opening import check_file
from dgemma.progress import progress_bar
from dgemma.sizes import size_text

from . import encode
from .errors import ConvertError
from .memory import CONTEXT, needed
from .metadata import Keys, ParameterCounts, imatrix_keys
from .policy import FILE_TYPES, Policy, Type
from .sources import LeftOut, n_elements
from .tensors import MappedTensor
from .writer import Writer, shard_paths, split


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
    notes: list[str] = field(default_factory=list)  # what hinders nothing, but should be known
    n_parameters: int = 0
    memory_bytes: int | None = None  # about what running it takes, with memory.CONTEXT tokens
    seconds: float = 0.0
    dry_run: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """What a weight takes on average, scales, norms and multipliers included."""
        return 8 * self.n_bytes / max(self.n_parameters, 1)

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
        return {
            **asdict(self),
            "n_bytes": self.n_bytes,
            "bits_per_weight": self.bits_per_weight,
            "types": self.types,
        }


@dataclass(frozen=True)
class Target:
    """Where a file goes, and how it is written."""

    path: Path
    split_max_size: int = 0
    threads: int = 0
    force: bool = False
    dry_run: bool = False
    progress: bool = True
    began: float = field(default_factory=time.perf_counter)


def produce(
    tensors: Sequence[MappedTensor],
    policy: Policy,
    make_keys: Callable[[LlamaFileType, ParameterCounts], Keys],
    target: Target,
    *,
    n_experts: int = 0,
    importance: Importance | None = None,
    accept: Callable[[encode.Step], object] = lambda step: None,
    left_out: Sequence[LeftOut] = (),
    notes: Sequence[str] = (),
    checks: Sequence[Callable[[], object]] = (),
) -> Report:
    """Writes `tensors` in the types of `policy`, and says what was written.

    `accept` sees every step before the first byte and may raise; `checks` are called before the
    file gets its name, and may raise too.
    """
    steps = encode.plan(tensors, policy, importance)
    encode.check_types(steps)
    for step in steps:
        accept(step)
    infos = [info for step in steps for info in step.infos]
    counts = ParameterCounts(n_experts, ((t.name, t.source.shape) for t in tensors))
    keys = make_keys(_file_type(policy, steps), counts)
    if importance is not None:
        keys.update(imatrix_keys(importance))
    paths = shard_paths(target.path, len(split(infos, target.split_max_size)))
    if not target.dry_run:
        _write(steps, keys, target, checks)
    return Report(
        files=[str(path) for path in paths],
        outtype=policy.name,
        tensors=_tensor_reports(steps),
        left_out=list(left_out),
        notes=list(notes),
        n_parameters=counts.total,
        memory_bytes=needed(keys, sum(info.n_bytes for info in infos)),
        seconds=time.perf_counter() - target.began,
        dry_run=target.dry_run,
    )


def _write(
    steps: Sequence[encode.Step],
    keys: Keys,
    target: Target,
    checks: Sequence[Callable[[], object]],
) -> None:
    infos = [info for step in steps for info in step.infos]
    with (
        Writer(
            target.path, keys, infos, force=target.force, split_max_size=target.split_max_size
        ) as writer,
        progress_bar(
            target.path.name,
            sum(step.tensor.n_bytes for step in steps),
            in_bytes=True,
            enabled=target.progress,
        ) as bar,
    ):
        encode.run(steps, writer, target.threads, bar.update)
        for check in checks:
            check()
        writer.commit(_check_written)


def _check_written(path: Path) -> None:
    """ConvertError where the new file is none that the engine opens."""
    try:
        check_file(path)
    except (Error, ValueError) as error:
        reason = str(error).replace(f"{path}: ", "")
        raise ConvertError(f"the engine would refuse what was written: {reason}") from error


def _tensor_reports(steps: Sequence[encode.Step]) -> list[TensorReport]:
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


def _file_type(policy: Policy, steps: Sequence[encode.Step]) -> LlamaFileType:
    """`general.file_type`: the mix's, or that of the type which most weights have."""
    if policy.mix.default is not None:
        return policy.mix.file_type
    weights: Counter[Type] = Counter()
    for step in steps:
        weights[step.tensor.type] += n_elements(step.tensor.shape)
    most = weights.most_common(1)[0][0]
    return FILE_TYPES.get(most, LlamaFileType.GUESSED)


def describe(report: Report) -> list[str]:
    """The report as lines for people."""
    verb = "would write" if report.dry_run else "wrote"
    types = ", ".join(f"{n} {name}" for name, n in sorted(report.types.items()))
    lines = [
        f"{verb} {', '.join(report.files)}: {size_text(report.n_bytes)}, "
        f"{report.n_parameters / 1e6:,.1f} million weights of "
        f"{report.bits_per_weight:.2f} bits, tensors: {types}"
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
        names = ", ".join(left.names[:3]) + (", …" if len(left.names) > 3 else "")
        lines.append(
            f"left out: {left.n_tensors} tensors of {left.what} ({size_text(left.n_bytes)})"
            + (f": {names}" if names else "")
        )
    return lines + [f"note: {note}" for note in report.notes]
