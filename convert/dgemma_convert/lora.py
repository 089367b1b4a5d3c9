"""A LoRA adapter in PEFT's format, merged into the weights while they are converted.

An adapted matrix is W + s·B·A with A (r, n_cols) and B (n_rows, r), where s is lora_alpha / r, or
lora_alpha / √r with rank-stabilised scaling (`use_rslora`), times the user's own factor. DoRA then
brings each row to the length in its magnitude vector.

A stack of experts (`target_parameters`) has one pair for all: expert e has rows [e·r, (e+1)·r) of
A, and of B (n_rows, r, n_experts) the last index e. PEFT names such a pair by the module, `experts`
or `experts.base_layer`, not by the parameter; which one is meant shows in the shapes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgemma.quants import dequantize

from .errors import ConvertError
from .lora_file import (
    CONFIG,
    PREFIX,
    is_alpha,
    kohyas_module,
    modules_by_kohyas_name,
    open_weights,
    part_of,
    read_settings,
    refuse_other_mathematics,
)
from .policy import Type
from .safetensors_file import StoredTensor
from .sources import Bytes, LeftOut, PlainSource, Source, matrices, read_floats

# Not converted, so neither are their adapters.
VISION = ("vision_tower.", "embed_vision.")
ENCODER, DECODER = "encoder.language_model.", "decoder."  # their weights are the same
EMBEDDINGS = ("embed_tokens", "lm_head")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """The factors of one module, and the lengths of its rows if it is DoRA's."""

    module: str
    down: StoredTensor  # A
    up: StoredTensor  # B
    magnitude: StoredTensor | None


@dataclass(frozen=True)
class AdaptedSource:
    """`base` plus the product of a pair, as float32."""

    base: Source
    pair: Pair
    adapter: Adapter
    factor: float
    rank: int
    first_row: int = 0  # of B, for gate and up projections that are stored apart
    swapped: bool = False  # the pair adapts the transposed matrices: older PEFTs did so
    type: Type = Type.F32
    multipliers: None = None

    @property
    def name(self) -> str:
        """As in the checkpoint."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.base.shape

    def read(self, matrix: int, first: int, n: int) -> Bytes:
        """Rows [first, first + n) of one matrix."""
        data = self.base.read(matrix, first, n)
        values = dequantize(data, int(self.base.type), n, self.shape[-1])
        if self.base.multipliers is not None:
            values *= self.base.multipliers[matrix]
        up, down = self._factors(matrix)
        rows = slice(self.first_row + first, self.first_row + first + n)
        values += (up[rows] * np.float32(self.factor)) @ down
        if self.pair.magnitude is not None:
            lengths = self.adapter.floats(self.pair.magnitude).reshape(-1, 1)[rows]
            values *= lengths / np.linalg.norm(values, axis=1, keepdims=True)
        return values.view(np.uint8).reshape(-1)

    def _factors(self, matrix: int) -> tuple[Floats, Floats]:
        """B (n_rows, r) and A (r, n_cols) of one matrix."""
        n_matrices = matrices(self.shape)[0]
        down = self.adapter.floats(self.pair.down).reshape(n_matrices, self.rank, -1)[matrix]
        up = self.adapter.floats(self.pair.up).reshape(-1, self.rank, n_matrices)[:, :, matrix]
        return (down.T, up.T) if self.swapped else (up, down)


class Adapter:
    """An open adapter folder.

        with Adapter(folder, scale) as adapter:
            sources = adapter.merge(sources)  # to be read while the adapter is open

    ConvertError where it adapts what is not in the checkpoint, or in a way that cannot be merged.
    """

    def __init__(self, folder: Path, scale: float) -> None:
        if not math.isfinite(scale):
            raise ConvertError(f"--lora-scale {scale}: expected a finite number")
        self.folder, self.scale = folder, scale
        self.left_out: list[StoredTensor] = []  # of the vision tower
        self._settings = read_settings(folder)
        self._file = open_weights(folder)
        self._alphas: dict[str, float] = {}  # kohya's, by module
        # Slices of one tensor follow each other: its pair need not be read for each.
        self.floats = functools.lru_cache(maxsize=3)(read_floats)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def check_unchanged(self) -> None:
        """ConvertError where the file changed since it was opened."""
        self._file.check_unchanged()

    def unused(self) -> list[LeftOut]:
        """What the file will have no place for."""
        n_bytes = sum(tensor.n_bytes for tensor in self.left_out)
        return [LeftOut("adapted vision", len(self.left_out), n_bytes)] if self.left_out else []

    def merge(self, sources: Mapping[str, Source]) -> dict[str, Source]:
        """`sources` with the adapter added."""
        result = dict(sources)
        pairs, whole = self._read_names(result)
        adapted: set[str] = set()
        for pair in pairs.values():
            if any(part in pair.module for part in VISION):
                self.left_out += [pair.down, pair.up]
                continue
            # B starts as zeros: this module was never trained, as those of an unused mode.
            if pair.magnitude is None and not self.floats(pair.up).any():
                continue
            if ".encoder." in f".{pair.module}":
                self._check_encoder(pair, pairs)
                continue
            for target, source in self._adapt(pair, result):
                if target in adapted:
                    raise ConvertError(f"{self.folder}: adapts {target} twice")
                adapted.add(target)
                result[target] = source
        for name, tensor in whole.items():
            if any(part in name for part in VISION):
                self.left_out.append(tensor)
            elif ".encoder." not in f".{name}":
                self._replace(name, tensor, result)
            elif not self._is_decoders(name, tensor, whole, sources):
                raise self._refuse_encoder(tensor.name)
        return result

    def _read_names(
        self, sources: Mapping[str, Source]
    ) -> tuple[dict[str, Pair], dict[str, StoredTensor]]:
        """Pairs by module, and whole tensors (`modules_to_save`) by name."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        whole: dict[str, StoredTensor] = {}
        refuse_other_mathematics(self.folder, self._file.tensors)
        kohyas = modules_by_kohyas_name(sources)
        for name, tensor in self._file.tensors.items():
            if "lora_embedding_" in name:
                raise self._refuse_embedding(name)
            part = part_of(name)
            if part is not None:
                module = kohyas_module(part.module, kohyas) or part.module
                parts.setdefault(module, {})[part.part] = tensor
            elif is_alpha(tensor):
                module = name.removesuffix(".alpha")
                self._alphas[kohyas_module(module, kohyas) or module] = float(
                    self.floats(tensor).reshape(())
                )
            elif name.startswith(PREFIX) and (self._settings or {}).get("modules_to_save"):
                whole[name.removeprefix(PREFIX)] = tensor
            else:
                raise ConvertError(f"{self.folder}: tensor {name} is not half of a LoRA pair")
        pairs = {}
        for module, found in parts.items():
            down, up = found.get("lora_A"), found.get("lora_B")
            if down is None or up is None:
                name, lost = next(iter(found.values())).name, "lora_B" if down else "lora_A"
                raise ConvertError(
                    f"{self.folder}: tensor {name} is not half of a LoRA pair: {lost} is missing"
                )
            for half in found.values():
                if not np.isfinite(self.floats(half)).all():
                    raise ConvertError(
                        f"{self.folder}: tensor {half.name} has values that are infinite or no "
                        "numbers"
                    )
            pairs[module] = Pair(module, down, up, found.get("lora_magnitude_vector"))
        return pairs, whole

    def _check_encoder(self, pair: Pair, pairs: Mapping[str, Pair]) -> None:
        """An adapter of the encoder is all right where the decoder has the same one."""
        twin = pairs.get(pair.module.replace(ENCODER, DECODER))
        if twin is None or (pair.magnitude is None) != (twin.magnitude is None):
            raise self._refuse_encoder(pair.up.name)
        for own, other in (
            (pair.down, twin.down),
            (pair.up, twin.up),
            (pair.magnitude, twin.magnitude),
        ):
            if own and other and not np.array_equal(self.floats(own), self.floats(other)):
                raise self._refuse_encoder(own.name)

    def _is_decoders(
        self,
        name: str,
        tensor: StoredTensor,
        whole: Mapping[str, StoredTensor],
        sources: Mapping[str, Source],
    ) -> bool:
        """Whether a whole tensor of the encoder is the decoder's new one, or never changed."""
        twin = name.replace(ENCODER, DECODER)
        base = sources.get(_find(twin, sources) or "")
        candidates = [] if twin not in whole else [self.floats(whole[twin])]
        if isinstance(base, PlainSource):
            candidates.append(self.floats(base.stored))
        return any(np.array_equal(self.floats(tensor), other) for other in candidates)

    def _refuse_encoder(self, name: str) -> ConvertError:
        return ConvertError(
            f"{self.folder}: {name} adapts the encoder apart from the decoder; one set of weights "
            "serves both, so only an adapter of model.decoder can be merged"
        )

    def _adapt(self, pair: Pair, sources: Mapping[str, Source]) -> Iterator[tuple[str, Source]]:
        """What becomes of the tensors that a pair adapts."""
        module = pair.module
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        if module.endswith(EMBEDDINGS):
            raise self._refuse_embedding(pair.up.name)
        if not module.endswith(".experts"):
            target = _find(f"{module}.weight", sources)
            if target is None:
                raise ConvertError(
                    f"{self.folder}: adapts {module}.weight, which the checkpoint does not have"
                )
            yield target, self._adapted(pair, [target], sources, module)[0]
            return
        # The gate and up projections may be one tensor of the checkpoint or two.
        for names in (("gate_up_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            targets = [_find(f"{module}.{name}", sources) for name in names]
            found = [target for target in targets if target is not None]
            if len(found) == len(names):
                parameter = f"{module}.{'gate_up_proj' if len(names) == 2 else names[0]}"
                if adapted := self._adapted(pair, found, sources, parameter):
                    yield from zip(found, adapted, strict=True)
                    return
        raise ConvertError(
            f"{self.folder}: the pair for {module} has the shapes {list(pair.down.shape)} and "
            f"{list(pair.up.shape)}, which fit no projection of the experts"
        )

    def _adapted(
        self, pair: Pair, targets: list[str], sources: Mapping[str, Source], parameter: str
    ) -> list[AdaptedSource]:
        """The targets, whose rows follow each other in the pair; or none: another is meant."""
        shapes = [matrices(sources[target].shape) for target in targets]
        n_matrices, n_rows, n_cols = shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2]
        down, up, is_matrix = pair.down.shape, pair.up.shape, len(sources[targets[0]].shape) == 2
        rank = down[0] // n_matrices if down else 0
        fits = len(down) == len(up) == 2 and rank > 0 and down[0] == up[1] == rank * n_matrices
        straight = fits and (up[0], down[1]) == (n_rows, n_cols)
        swapped = fits and (up[0], down[1]) == (n_cols, n_rows) and not is_matrix and not straight
        if not straight and not swapped:
            if not is_matrix:
                return []
            raise ConvertError(
                f"{self.folder}: the pair for {targets[0]} has the shapes {list(down)} and "
                f"{list(up)}; the weight has {list(sources[targets[0]].shape)}"
            )
        if pair.magnitude is not None and math.prod(pair.magnitude.shape) != n_rows:
            raise ConvertError(f"{self.folder}: {pair.magnitude.name} needs {n_rows} values")
        self._check_rank(pair, parameter, rank)
        factor, first, adapted = self._factor(pair.module, parameter, rank), 0, []
        for target, shape in zip(targets, shapes, strict=True):
            adapted.append(AdaptedSource(sources[target], pair, self, factor, rank, first, swapped))
            first += shape[1]
        return adapted

    def _check_rank(self, pair: Pair, parameter: str, rank: int) -> None:
        """ConvertError where the settings speak of another rank: its strength would be wrong."""
        settings = self._settings
        if settings is None or pair.module in self._alphas:
            return
        said = self._by_pattern("rank_pattern", parameter, settings["r"])
        if said != rank:
            raise ConvertError(
                f"{self.folder}: the pair for {parameter} has the rank {rank}, {CONFIG} says "
                f"{said}: they do not belong together"
            )

    def _by_pattern(self, key: str, parameter: str, default: Any) -> Any:
        """The value of the first pattern that fits, as PEFT looks for it."""
        for pattern, value in ((self._settings or {}).get(key) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", parameter):
                    return value
            except re.error as error:
                raise ConvertError(f"{self.folder}: {key} {pattern!r}: {error}") from error
        return default

    def _factor(self, module: str, parameter: str, rank: int) -> float:
        """How often the product of a pair is added."""
        if self._settings is None:
            if module not in self._alphas:
                raise ConvertError(
                    f"{self.folder}: neither {CONFIG} nor the file says how strong the pair for "
                    f"{module} is (lora_alpha)"
                )
            return self.scale * self._alphas[module] / rank
        alpha = self._alphas.get(module, self._settings["lora_alpha"])
        alpha = self._by_pattern("alpha_pattern", parameter, alpha)
        root = self._settings.get("use_rslora")
        return self.scale * float(alpha) / (math.sqrt(rank) if root else rank)

    def _replace(self, name: str, tensor: StoredTensor, sources: dict[str, Source]) -> None:
        """Takes a whole tensor from the adapter."""
        if any(embedding in name for embedding in EMBEDDINGS):
            raise self._refuse_embedding(tensor.name)
        target = _find(name, sources)
        if target is None or sources[target].shape != tensor.shape:
            raise ConvertError(
                f"{self.folder}: tensor {tensor.name} {list(tensor.shape)} replaces none of the "
                "checkpoint's"
            )
        if self.scale != 1:
            raise ConvertError(
                f"{self.folder}: {tensor.name} replaces a tensor (modules_to_save), which "
                "--lora-scale cannot weigh; leave it at 1"
            )
        sources[target] = PlainSource(tensor)

    def _refuse_embedding(self, name: str) -> ConvertError:
        return ConvertError(
            f"{self.folder}: {name} adapts the embedding or the head alone; they are one tensor in "
            "the model, so this cannot be merged"
        )


def _find(name: str, sources: Mapping[str, Source]) -> str | None:
    """The checkpoint's name of a tensor, of which adapters know several spellings.

    Checkpoints of the bare model lack its first part; programs that do not know this architecture
    speak of a `language_model`, or of no part at all.
    """
    spellings = [name]
    if ".encoder." not in f".{name}" and ".decoder." not in f".{name}":
        bare = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
        spellings.append(f"model.decoder.{bare}")
    for spelling in spellings:
        for candidate in (spelling, spelling.removeprefix("model.")):
            if candidate in sources:
                return candidate
    return None
