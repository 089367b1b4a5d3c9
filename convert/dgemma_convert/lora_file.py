"""A LoRA adapter's file: its tensors under the names that PEFT gives them, and its settings.

Programs name the two factors of a module in several ways:

    PEFT        base_model.model.MODULE.lora_A.weight; with the adapter's name lora_A.default.weight
    others      MODULE.lora_A.weight, MODULE.lora_down.weight
    kohya's     lora_PART_MODULE.lora_down.weight, with `_` for every dot, and MODULE.alpha
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConvertError
from .json_file import read_json
from .safetensors_file import SafetensorsFile, StoredTensor
from .torch_file import TorchFile

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# Ways to start that take away from the weights what the adapter then holds. Their pairs belong to
# weights that are not those of the checkpoint.
STARTS_ON_OTHER_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PARTS = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora_magnitude_vector)"
    r"(\.(?!weight\Z)\w+)?(\.weight)?\Z"
)
_OTHER_MATHEMATICS = re.compile(
    r"\.(hada_w|lokr_w|oft_|boft_|ia3_l|vera_lambda|dora_scale|lora_mid|diff\b|diff_b\b|w_norm)"
)
_KOHYA = re.compile(r"lora_(?:te\d?_|unet_|transformer_|llm_)?")


class Part(NamedTuple):
    """What a tensor of the file is for; `part` is lora_A, lora_B or lora_magnitude_vector."""

    module: str
    part: str


def open_weights(folder: Path) -> SafetensorsFile:
    """The file with the pairs: of an adapter's folder, or `folder` itself where it is a file."""
    if folder.is_file():
        path = folder
    elif not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder; expected an adapter")
    else:
        named = [folder / name for name in WEIGHTS if (folder / name).exists()]
        others = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if not named and len(others) != 1:
            inner = sorted(path.parent for path in folder.glob(f"*/{WEIGHTS[0]}"))
            hint = f"; did you mean {inner[-1]}?" if inner else ""
            raise ConvertError(f"{folder}: has no {' or '.join(WEIGHTS)}{hint}")
        path = (named or others)[0]
    return TorchFile(path) if path.suffix in (".bin", ".pt", ".pth") else SafetensorsFile(path)


def part_of(name: str) -> Part | None:
    """The part that a tensor's name stands for, without the adapter's name; None for others."""
    match = _PARTS.match(name)
    if match is None:
        return None
    part = {"lora_down": "lora_A", "lora_up": "lora_B"}.get(match["part"], match["part"])
    return Part(match["module"].removeprefix(PREFIX), part)


def refuse_other_mathematics(folder: Path, names: Iterable[str]) -> None:
    """ConvertError where the file holds something else than pairs of factors."""
    for name in names:
        if match := _OTHER_MATHEMATICS.search(name):
            raise ConvertError(
                f"{folder}: tensor {name} ({match[1]}) is not of LoRA's mathematics: only "
                "W + s·B·A and PEFT's DoRA can be merged"
            )


def modules_by_kohyas_name(names: Iterable[str]) -> dict[str, str]:
    """The modules of weights with these names, by kohya's names of them."""
    found: dict[str, str] = {}
    for name in names:
        module = name.removesuffix(".weight")
        bare = module.removeprefix("model.").removeprefix("decoder.")
        for spelling in (module, f"decoder.{bare}", f"model.{bare}", f"language_model.{bare}",
                         f"model.language_model.{bare}", bare):  # fmt: skip
            if "encoder" not in module:
                found.setdefault(spelling.replace(".", "_"), module)
    return found


def kohyas_module(name: str, modules: dict[str, str]) -> str | None:
    """The module that one of kohya's names means; None where it is none of them."""
    return modules.get(_KOHYA.sub("", name, count=1)) if name.startswith("lora_") else None


def read_settings(folder: Path) -> dict[str, Any] | None:
    """adapter_config.json; None where there is none. ConvertError for what cannot be merged."""
    path = (folder.parent if folder.is_file() else folder) / CONFIG
    if not path.exists():
        return None
    settings: Any = read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ConvertError(f"{path}: not a LoRA adapter (peft_type must be 'LORA')")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        raise ConvertError(f"{path}: bias is set; the model has none")
    if settings.get("layer_replication"):
        raise ConvertError(
            f"{path}: layer_replication is set; the model's layers are what they are"
        )
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(STARTS_ON_OTHER_WEIGHTS):
        raise ConvertError(
            f"{path}: init_lora_weights is {start!r}, which changes the weights themselves; make a "
            "plain adapter of it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("use_qalora", "alora_invocation_tokens", "use_bdlora", "velora_config"):
        if settings.get(key):
            raise ConvertError(f"{path}: {key} is set; such an adapter cannot be merged")
    alphas = [settings.get("lora_alpha"), *_values(path, settings, "alpha_pattern")]
    ranks = [settings.get("r"), *_values(path, settings, "rank_pattern")]
    if not all(type(rank) is int and rank >= 1 for rank in ranks) or not all(
        type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas
    ):
        raise ConvertError(f"{path}: expected numbers r ≥ 1 and lora_alpha")
    return settings


def _values(path: Path, settings: dict[str, Any], key: str) -> list[Any]:
    """The numbers of a pattern. Ranks are seen in the shapes, so theirs are only checked."""
    pattern = settings.get(key) or {}
    if not isinstance(pattern, dict):
        raise ConvertError(f"{path}: {key} must be an object")
    return list(pattern.values())


def is_alpha(tensor: StoredTensor) -> bool:
    """Whether it is kohya's `MODULE.alpha`, one number."""
    return tensor.name.endswith(".alpha") and math.prod(tensor.shape) == 1
