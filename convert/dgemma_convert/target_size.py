"""The best types for a file of a given size: `dgemma quantize --target-size`.

What a tensor costs in a type is foretold as the divergence that its group of tensors was measured
to cause in Q4_0 (bench/outtypes.py, rows "only … in q4_0"), times the tensor's share of its group,
times its own squared error in that type over that in Q4_0. The errors are measured here, on rows of
the tensor itself, weighed by the importance matrix. From the best types down, the step that adds
least divergence for the bytes it saves is taken, until the file fits; what room that leaves is
filled. The named mixes that fit are other places to start from, so none of them is better.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgemma.charts import Series, chart
from dgemma.files import write_file
from dgemma.importance import Importance
from dgemma.quants import dequantize, quantize, type_info
from dgemma.sizes import size_text
from dgemma.tensor_kinds import Kind

from .errors import ConvertError
from .policy import MIXES, WITH_MULTIPLIER, Mix, Policy, Type, fitting, row_bytes
from .sources import matrices, n_elements
from .tensors import MappedTensor

# Divergence in nats with that group alone in Q4_0: geometric mean over the two models measured.
SENSITIVITIES = {
    r"token_embd\.weight": 1.97e-3,
    r"self_cond_": 3.78e-4,
    r"attn_q\.weight": 5.46e-4,
    r"attn_k\.weight": 8.74e-4,
    r"attn_v\.weight": 3.98e-4,
    r"attn_output\.weight": 8.77e-4,
    r"ffn_(gate|up)\.weight": 2.08e-4,
    r"ffn_down\.weight": 2.62e-4,
    r"ffn_(gate_up|gate|up)_exps\.weight": 3.49e-4,
    r"ffn_down_exps\.weight": 1.94e-4,
}
CANDIDATES = (
    Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q5_1, Type.Q5_0, Type.Q4_K, Type.IQ4_NL, Type.IQ4_XS,
    Type.Q3_K, Type.IQ3_S, Type.IQ3_XXS, Type.Q2_K, Type.IQ2_S, Type.IQ2_XS,
)  # fmt: skip
SAMPLED_MATRICES, SAMPLED_ROWS = 4, 8  # of a tensor
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(GiB|MiB|KiB|GB|MB|KB|G|M|K|B|)\Z", re.IGNORECASE)
_UNITS = {
    "": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
}  # fmt: skip

Floats = NDArray[np.float32]


def parse_target(text: str) -> int:
    """Bytes of "11.5GiB" or "12GB"; ConvertError where it is no size."""
    match = _SIZE.match(text.strip())
    n_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if n_bytes < 1:
        raise ConvertError(f"--target-size {text!r}: expected a size such as 11.5GiB or 12GB")
    return n_bytes


@dataclass(frozen=True)
class Choice:
    """A type for a tensor: what it takes, and the divergence that it is foretold to add."""

    type: Type
    n_bytes: int
    divergence: float


@dataclass(frozen=True)
class Plan:
    """Types by tensor name; `path`: (bytes of the file, divergence) of every mix on the way."""

    types: dict[str, Type]
    n_bytes: int
    divergence: float
    path: list[tuple[int, float]]

    def policy(self, name: str, given: Policy) -> Policy:
        """Exactly these types, but for the exceptions that the user gave."""
        own = [(re.compile(rf"{re.escape(n)}\Z"), kind) for n, kind in self.types.items()]
        return Policy(name, MIXES["auto"], [*given.by_name, *own], given.token_embedding)

    def draw(self, path: Path, target: int) -> None:
        """The divergence over the size, as SVG."""
        curve = [(n / 1e9, d) for n, d in self.path if d > 0]
        found = [(self.n_bytes / 1e9, self.divergence)]
        series = [Series("best mixes", curve, joined=True), Series("this file", found)]
        title = f"Divergence by size; {size_text(target)} were asked for"
        write_file(path, chart(title, "GB", "foretold divergence in nats", series))


def plan_size(
    tensors: Sequence[MappedTensor],
    given: Policy,
    target: int,
    importance: Importance | None = None,
    threads: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> Plan:
    """The types with the least foretold divergence whose tensors take at most `target` bytes.

    `given`: exceptions that the user made, which stay. ConvertError where not even the smallest
    types fit.
    """
    shares = _group_sizes(tensors)
    fixed, options = 0, {}
    for tensor in tensors:
        chosen = _given_type(tensor, given)
        if chosen is not None:
            fixed += _bytes(tensor, chosen)
        else:
            options[tensor.name] = _choices(tensor, shares, importance, threads)
        progress(1)
    found, path = _descend({name: _hull(its) for name, its in options.items()}, fixed, target)
    if path[-1][0] > target:
        raise ConvertError(
            f"--target-size: the smallest types take {size_text(path[-1][0])}, more than the "
            f"{size_text(target)} that were asked for"
        )
    room = target - fixed
    mixes = (_as_in(mix, tensors, options) for mix in MIXES.values())
    starts = [found, *(mix for mix in mixes if mix is not None and _size(mix) <= room)]
    best = min((_fill(options, start, room) for start in starts), key=_divergence)
    path[-1] = (fixed + _size(best), _divergence(best))
    return Plan({name: choice.type for name, choice in best.items()}, *path[-1], path)


def foretell(
    tensors: Sequence[MappedTensor],
    policy: Policy,
    importance: Importance | None = None,
    threads: int = 0,
) -> float:
    """The divergence in nats that a file of `tensors` in the types of `policy` is foretold.

    It is what `plan_size` lowers, for types that were chosen otherwise.
    """
    shares, total = _group_sizes(tensors), 0.0
    for tensor in tensors:
        wanted = policy.wanted(tensor.name, tensor.kind, tensor.source.type)
        kind = fitting(wanted, tensor.source.shape[-1])
        if tensor.kind is Kind.VECTOR or type_info(int(kind)).block_size == 1:
            continue
        (choice,) = _priced(tensor, shares, [kind], importance, threads)
        total += choice.divergence
    return total


def _group(name: str) -> str:
    for pattern in SENSITIVITIES:
        if re.search(rf"(^|\.){pattern}", name):
            return pattern
    return r"token_embd\.weight"  # nothing is known of it: as careful as with the most sensitive


def _group_sizes(tensors: Sequence[MappedTensor]) -> Counter[str]:
    found: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.kind is not Kind.VECTOR:
            found[_group(tensor.name)] += n_elements(tensor.source.shape)
    return found


def _given_type(tensor: MappedTensor, given: Policy) -> Type | None:
    """The type that is not free: a vector's, or one that the user chose."""
    if tensor.kind is Kind.VECTOR:
        return Type.F32
    for pattern, kind in given.by_name:
        if pattern.search(tensor.name):
            return kind
    return given.token_embedding if tensor.kind is Kind.EMBEDDING else None


def _bytes(tensor: MappedTensor, kind: Type) -> int:
    shape = tensor.source.shape
    return n_elements(shape[:-1]) * row_bytes(kind, shape[-1])


def _choices(
    tensor: MappedTensor, shares: Counter[str], importance: Importance | None, threads: int
) -> list[Choice]:
    """Every candidate that fits the rows, and F16 where none does."""
    n_cols = tensor.source.shape[-1]
    kinds = [kind for kind in CANDIDATES if n_cols % type_info(int(kind)).block_size == 0]
    if not kinds:
        return [Choice(Type.F16, _bytes(tensor, Type.F16), 0.0)]
    return _priced(tensor, shares, kinds, importance, threads)


def _priced(
    tensor: MappedTensor,
    shares: Counter[str],
    kinds: Sequence[Type],
    importance: Importance | None,
    threads: int,
) -> list[Choice]:
    """What the tensor takes and costs in each of `kinds`, whose blocks fit its rows."""
    group = _group(tensor.name)
    weight = SENSITIVITIES[group] * n_elements(tensor.source.shape) / shares[group]
    errors = _errors(tensor, [*kinds, Type.Q4_0], importance, threads)
    unit = weight / max(errors[Type.Q4_0], 1e-30)
    return [Choice(kind, _bytes(tensor, kind), unit * errors[kind]) for kind in kinds]


def _errors(
    tensor: MappedTensor, kinds: Sequence[Type], importance: Importance | None, threads: int
) -> dict[Type, float]:
    """Squared errors on some rows, weighed by importance."""
    n_matrices, n_rows, n_cols = matrices(tensor.source.shape)
    weights = None if importance is None else importance.of(tensor.name, n_matrices, n_cols)
    found = dict.fromkeys(kinds, 0.0)
    n = min(SAMPLED_ROWS, n_rows)
    for matrix in np.unique(np.linspace(0, n_matrices - 1, SAMPLED_MATRICES).astype(int)).tolist():
        source = tensor.source
        data = source.read(matrix, (n_rows - n) // 2, n)
        values = dequantize(data, int(source.type), n, n_cols)
        own = None if weights is None else weights[matrix]
        for kind in kinds:
            encoded, multiplier = quantize(
                values,
                "f32",
                int(kind),
                n,
                n_cols,
                importance=own,
                with_multiplier=kind is Type.NVFP4 and tensor.kind in WITH_MULTIPLIER,
                threads=threads,
            )
            found_values = dequantize(encoded, int(kind), n, n_cols) * np.float32(multiplier)
            difference = np.square(found_values - values)
            found[kind] += float((difference if own is None else difference * own).sum())
    return found


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those on the way from the best to the smallest that no other beats, steeper and steeper."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (-c.n_bytes, c.divergence)):
        if hull and choice.n_bytes == hull[-1].n_bytes:
            continue
        while hull and choice.divergence <= hull[-1].divergence:
            hull.pop()
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _price(a: Choice, b: Choice) -> float:
    """Divergence added for a byte saved by going from `a` to the smaller `b`."""
    return (b.divergence - a.divergence) / max(a.n_bytes - b.n_bytes, 1)


def _descend(
    options: dict[str, list[Choice]], fixed: int, target: int
) -> tuple[dict[str, Choice], list[tuple[int, float]]]:
    """From the best types down to `target` bytes, the cheapest step first."""
    at = {name: choices[0] for name, choices in options.items()}
    n_bytes, divergence = fixed + _size(at), _divergence(at)
    path = [(n_bytes, divergence)]
    steps = sorted(
        (_price(a, b), name, i)
        for name, choices in options.items()
        for i, (a, b) in enumerate(pairwise(choices))
    )
    for _, name, i in steps:
        if n_bytes <= target:
            break
        before, after = options[name][i], options[name][i + 1]
        at[name] = after
        n_bytes += after.n_bytes - before.n_bytes
        divergence += after.divergence - before.divergence
        path.append((n_bytes, divergence))
    return at, path


def _size(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.n_bytes for choice in chosen.values())


def _divergence(chosen: Mapping[str, Choice]) -> float:
    return sum(choice.divergence for choice in chosen.values())


def _as_in(
    mix: Mix, tensors: Sequence[MappedTensor], options: Mapping[str, Sequence[Choice]]
) -> dict[str, Choice] | None:
    """What a named mix makes of the tensors that are free; None where it has other types."""
    chosen = {}
    for tensor in tensors:
        if tensor.name not in options:
            continue
        wanted = mix.kinds.get(tensor.kind, mix.default)
        kind = None if wanted is None else fitting(wanted, tensor.source.shape[-1])
        own = [choice for choice in options[tensor.name] if choice.type is kind]
        if not own:
            return None
        chosen[tensor.name] = own[0]
    return chosen


def _fill(
    options: Mapping[str, Sequence[Choice]], start: Mapping[str, Choice], room: int
) -> dict[str, Choice]:
    """`start` with better types as long as one fits, that which lowers the divergence most first.

    The last step down may have been a large one, which leaves room.
    """
    chosen, n_bytes = dict(start), _size(start)
    while True:
        best, gain = None, 0.0
        for name, choices in options.items():
            now = chosen[name]
            for choice in choices:
                fits = n_bytes - now.n_bytes + choice.n_bytes <= room
                if fits and now.divergence - choice.divergence > gain:
                    best, gain = (name, choice), now.divergence - choice.divergence
        if best is None:
            return chosen
        name, choice = best
        n_bytes += choice.n_bytes - chosen[name].n_bytes
        chosen[name] = choice
