"""From one GGUF file to another: the same model in other types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, LlamaFileType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from dgemma.charts import check_name
from dgemma.errors import Error
from dgemma.gguf_file import File, Tensor
from dgemma.importance import Importance
from dgemma.tensor_kinds import kind_of

from . import encode
from .errors import ConvertError, failing_in_words
from .metadata import ARCHITECTURE, QUANTIZATION_VERSION, Keys
from .policy import Type, make_policy, row_bytes
from .production import Report, Target, produce
from .sources import Bytes, matrices
from .target_size import foretell, plan_size
from .tensors import MappedTensor

BEST = "best"  # the outtype that a target size decides
EXACT_TYPES = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True)
class GGUFSource:
    """A tensor of an open file. It is read and not mapped: see `File.read`."""

    file: File
    tensor: Tensor
    multipliers: NDArray[np.float32] | None

    @property
    def name(self) -> str:
        """As in the file."""
        return self.tensor.name

    @property
    def type(self) -> Type:
        """As in the file."""
        return Type(self.tensor.type.id)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.tensor.shape

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) of one matrix."""
        _, n_rows, n_cols = matrices(self.shape)
        stride = row_bytes(self.type, n_cols)
        try:
            return self.file.read(self.name, (matrix * n_rows + first) * stride, n * stride)
        except Error as error:
            raise ConvertError(str(error)) from error


def quantize(
    src: Path,
    outfile: Path,
    outtype: str,
    *,
    target_size: int = 0,
    plot: Path | None = None,
    allow_requantize: bool = False,
    token_embedding_type: str | None = None,
    tensor_types: Sequence[str] = (),
    imatrix: Path | None = None,
    threads: int = 0,
    split_max_size: int = 0,
    force: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Report:
    """Writes the model of the GGUF file `src` (or its shards) to `outfile`, its tensors re-encoded.

    With the `outtype` "best" there is a `target_size`, the most bytes that the file may have, for
    which the best mix is looked for; `plot` is drawn then, divergence by size, as SVG.

    Other options as in `convert`. Raises ConvertError; also where a tensor that is quantized
    already would be quantized again, which adds up two errors, without `allow_requantize`.
    """
    with failing_in_words("quantizing"), File(src) as file:
        if (outtype == BEST) != (target_size > 0):
            raise ConvertError(f"a target size goes with the type {BEST!r}, and with no other")
        if plot is not None and not target_size:
            raise ConvertError("--plot draws what --target-size finds")
        if plot is not None:
            check_name(plot)
        policy = make_policy("auto" if target_size else outtype, tensor_types, token_embedding_type)
        importance = None if imatrix is None else Importance(imatrix)
        if file.keys.get("general.architecture") != ARCHITECTURE:
            raise ConvertError(f"{src}: not a DiffusionGemma model ({ARCHITECTURE})")
        tensors = _mapped(file)
        if target_size:
            # What is no tensor, the vocabulary above all, is about what it was.
            rest = file.n_bytes - sum(len(tensor.data) for tensor in file.tensors)
            found = plan_size(tensors, policy, target_size - rest, importance, threads)
            policy = found.policy(f"{target_size} bytes", policy)
            if plot is not None:
                found.draw(plot, target_size)
        return produce(
            tensors,
            policy,
            lambda file_type, counts: _keys(file, file_type),
            Target(outfile, split_max_size, threads, force, dry_run, progress),
            importance=importance,
            accept=(lambda step: None) if allow_requantize else _refuse_requantizing,
            checks=[file.check_unchanged],
        )


def foretell_file(src: Path, outtype: str, tensor_types: Sequence[str] = ()) -> float:
    """The divergence in nats that the model of a GGUF file is foretold in other types.

    By the same sensitivities and errors as `quantize` finds the best mix for a size with. Raises
    ConvertError.
    """
    with failing_in_words("reading"), File(src) as file:
        return foretell(_mapped(file), make_policy(outtype, tensor_types))


def _mapped(file: File) -> list[MappedTensor]:
    """All tensors; those that are multipliers of another are attached to it."""
    tensors = {tensor.name: tensor for tensor in file.tensors}
    mapped = []
    for tensor in list(tensors.values()):
        multipliers = None
        # The down projections' multiplier is part of the router's scale, which stays as it is.
        if tensor.name.endswith(".weight") and not tensor.name.endswith("ffn_down_exps.weight"):
            scale = tensors.get(tensor.name.removesuffix("weight") + "scale")
            if tensor.type.id == Type.NVFP4 and scale is not None:
                if scale.type.id != Type.F32 or scale.shape != matrices(tensor.shape)[:1]:
                    raise ConvertError(
                        f"tensor {scale.name}: {scale.type.name} {list(scale.shape)}; expected a "
                        f"float32 multiplier for each matrix of {tensor.name}"
                    )
                multipliers = file.read(scale.name, 0, len(scale.data)).view(np.float32)
                del tensors[scale.name]
        mapped.append(
            MappedTensor(tensor.name, kind_of(tensor.name), GGUFSource(file, tensor, multipliers))
        )
    return [tensor for tensor in mapped if tensor.name in tensors]


def _refuse_requantizing(step: encode.Step) -> None:
    source, target = step.source.type, step.tensor.type
    if source not in EXACT_TYPES and source is not target:
        raise ConvertError(
            f"tensor {step.source.name} is {source.name.lower()} already; make "
            f"{target.name.lower()} from a file of f32, f16 or bf16, or accept the loss with "
            "--allow-requantize"
        )


def _keys(file: File, file_type: LlamaFileType) -> Keys:
    """The file's keys with their types, but for those that describe the file, not the model."""
    keys: Keys = {}
    for name, value in file.keys.items():
        if name.startswith("split.") or name == "general.alignment" or value == []:
            continue
        value_type, element_type = map(GGUFValueType, file.keys.type_of(name))
        array = value_type is GGUFValueType.ARRAY
        keys[name] = GGUFValue(value, value_type, element_type if array else None)
    keys["general.file_type"] = GGUFValue(int(file_type), GGUFValueType.UINT32)
    keys["general.quantization_version"] = GGUFValue(QUANTIZATION_VERSION, GGUFValueType.UINT32)
    return keys
