"""A LoRA adapter in PEFT's format, merged into the weights while they are converted.

An adapted matrix is W + s·B·A with A (r, n_cols) and B (n_rows, r), where s is lora_alpha / r, or
lora_alpha / √r with rank-stabilised scaling (`use_rslora`), times the user's own factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgemma import _native

from .errors import ConvertError
from .policy import Type
from .safetensors_file import SafetensorsFile, read_json
from .sources import Bytes, Source, read_floats

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# Settings under which the merged matrix is another than the one above.
REFUSED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")


@dataclass(frozen=True)
class AdaptedSource:
    """`base` plus the adapter's product, as float32."""

    base: Source
    down: NDArray[np.float32]  # A, (r, n_cols)
    up: NDArray[np.float32]  # s·B, (n_rows, r)
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
        """Rows [first, first + n)."""
        data = self.base.read(matrix, first, n)
        values = _native.dequantize(data, int(self.base.type), n, self.shape[-1])
        if self.base.multipliers is not None:
            values *= self.base.multipliers[matrix]
        values += self.up[first : first + n] @ self.down
        return values.view(np.uint8).reshape(-1)


def merge(folder: Path, scale: float, sources: dict[str, Source]) -> dict[str, Source]:
    """`sources` with the adapter in `folder` added `scale` times.

    ConvertError where it adapts what is not in the checkpoint, or in another way than LoRA's.
    """
    if not math.isfinite(scale):
        raise ConvertError(f"--lora-scale {scale}: expected a finite number")
    factor = scale * _factor(folder / CONFIG)
    file = SafetensorsFile(folder / WEIGHTS)
    try:
        matrices = {name: read_floats(tensor) for name, tensor in file.tensors.items()}
    finally:
        file.close()

    result = dict(sources)
    for name, down in matrices.items():
        if name.endswith(UP) and name.removesuffix(UP) + DOWN in matrices:
            continue
        up = matrices.get(name.removesuffix(DOWN) + UP)
        target = name.removeprefix(PREFIX).removesuffix(DOWN) + ".weight"
        if ".encoder." in name:
            raise ConvertError(
                f"{folder}: {name} adapts the encoder apart from the decoder; one set of weights "
                "serves both, so only an adapter of model.decoder can be merged"
            )
        if not name.startswith(PREFIX) or not name.endswith(DOWN) or up is None:
            raise ConvertError(f"{folder}: tensor {name} is not half of a LoRA pair")
        if target not in result:
            raise ConvertError(f"{folder}: adapts {target}, which the checkpoint does not have")
        rank = len(down)
        if (
            down.ndim != 2
            or (len(up), down.shape[-1]) != result[target].shape
            or up.shape[1:] != (rank,)
        ):
            raise ConvertError(
                f"{folder}: the pair for {target} has the shapes {list(down.shape)} and "
                f"{list(up.shape)}; the weight has {list(result[target].shape)}"
            )
        result[target] = AdaptedSource(result[target], down, up * np.float32(factor))
    return result


def _factor(path: Path) -> float:
    """lora_alpha / r of an adapter's settings."""
    settings: Any = read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ConvertError(f"{path}: not a LoRA adapter (peft_type must be 'LORA')")
    for key in REFUSED:
        if settings.get(key):
            raise ConvertError(f"{path}: {key} is set; such an adapter cannot be merged here")
    if settings.get("bias", "none") != "none":
        raise ConvertError(f"{path}: bias is set; the model has none")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise ConvertError(f"{path}: expected numbers r ≥ 1 and lora_alpha")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
