"""All keys of the new file."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter, LlamaFileType, Metadata, size_label
from gguf.constants import Keys as Names
from gguf.gguf_writer import GGUFValue

from dgemma.generation.declared import SamplingOptions, declared
from dgemma.importance import Importance

from .config import ModelConfig
from .errors import ConvertError
from .json_file import is_there, read_json, read_text
from .tokenizer import Vocabulary, check_templates, read_vocabulary

ARCHITECTURE = "diffusion-gemma"
QUANTIZATION_VERSION = 2  # of GGUF's block formats
MAX_NUMBER = 10**5  # of a temperature or an entropy: the engine reads more, no checkpoint means it

Keys = dict[str, GGUFValue]


def checkpoint_keys(
    folder: Path,
    config: ModelConfig,
    file_type: LlamaFileType,
    counts: ParameterCounts,
    general: Mapping[str, Any],
    notes: list[str],
) -> Keys:
    """The keys for a checkpoint folder, with its generation defaults and model card if there.

    `general` are values of `Metadata` fields that come before those of the card; one is `name`.
    What a user should know, but what hinders nothing, is added to `notes`.
    """
    generation = _generation_config(folder)
    sampling = _sampling(folder, generation)
    vocabulary = read_vocabulary(folder, config, generation, notes)
    card = _read_card(folder, counts, notes)
    keys = model_keys(card, config, file_type, counts, general, sampling, vocabulary)
    check_templates(folder, keys, notes)
    return keys


def model_keys(
    card: Metadata,
    config: ModelConfig,
    file_type: LlamaFileType,
    counts: ParameterCounts,
    general: Mapping[str, Any],
    sampling: dict[str, int | float],
    vocabulary: Vocabulary,
) -> Keys:
    """All keys. `card`: what is known of licence and origin; `sampling`: `diffusion.eb_*`."""
    # The writer only collects: it is never given a file.
    keys = GGUFWriter(None, ARCHITECTURE)
    _add_general(keys, card, file_type, counts, general)
    _add_model(keys, config)
    keys.add_uint32("diffusion.canvas_length", config.canvas_length)
    for key, value in sampling.items():
        if isinstance(value, int):
            keys.add_uint32(f"diffusion.{key}", value)
        else:
            keys.add_float32(f"diffusion.{key}", value)
    vocabulary.add_to(keys)
    return keys.kv_data[0]


def folder_name(folder: Path) -> str:
    """The model's name by its folder; in a download cache the folder's own name is a commit."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--")[-1]
    return folder.name or "model"


def imatrix_keys(importance: Importance) -> Keys:
    """What a file says of the importance matrix it was made with; llama.cpp's names."""
    keys = {
        "quantize.imatrix.file": GGUFValue(importance.path.name, GGUFValueType.STRING),
        "quantize.imatrix.entries_count": GGUFValue(len(importance), GGUFValueType.UINT32),
    }
    if importance.datasets:
        dataset = Path(importance.datasets[0]).name
        keys["quantize.imatrix.dataset"] = GGUFValue(dataset, GGUFValueType.STRING)
    if importance.chunk_count:
        count = GGUFValue(importance.chunk_count, GGUFValueType.UINT32)
        keys["quantize.imatrix.chunks_count"] = count
    return keys


class ParameterCounts:
    """Numbers of weights, for the size label ("128x2.6B")."""

    def __init__(self, n_experts: int, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        self.n_experts = n_experts
        self.total = self.in_experts = 0
        for name, shape in shapes:
            n = math.prod(shape)
            self.total += n
            if "_exps.weight" in name:
                self.in_experts += n

    @property
    def size_label(self) -> str:
        """Experts, times the size of a model that had only one."""
        label: str = size_label(
            self.total,
            self.total - self.in_experts,
            self.in_experts // max(self.n_experts, 1),
            self.n_experts,
        )
        return label


def _fields() -> dict[str, str]:
    """The `general.*` keys that a user may set, and the fields of `Metadata` behind them."""
    fields = {"general.base_models": "base_models", "general.datasets": "datasets"}
    for field in vars(Metadata()):
        if hasattr(Names.General, field.upper()) and not field.startswith("sampling_"):
            fields[getattr(Names.General, field.upper())] = field
    return fields


def read_overrides(path: Path) -> dict[str, Any]:
    """Fields of `Metadata` from a JSON file with `general.*` keys, as llama.cpp's converter reads.

    ConvertError where it has other keys, or values of other kinds.
    """
    values, fields = read_json(path), _fields()
    if not isinstance(values, dict):
        raise ConvertError(f"{path}: must be a JSON object")
    found = {}
    for key, value in values.items():
        if key not in fields:
            known = " ".join(sorted(fields))
            raise ConvertError(f"{path}: {key!r} cannot be set; expected some of {known}")
        field = fields[key]
        if field in ("base_models", "datasets"):
            expected, fits = (
                "a list of objects of texts",
                isinstance(value, list)
                and all(
                    isinstance(entry, dict)
                    and all(isinstance(text, str) for text in entry.values())
                    for entry in value
                ),
            )
        elif field in ("tags", "languages"):
            expected, fits = (
                "a list of texts",
                isinstance(value, list) and all(isinstance(text, str) for text in value),
            )
        else:
            expected, fits = "a text", isinstance(value, str)
        if not fits:
            raise ConvertError(f"{path}: {key} is {str(value)[:80]!r}; expected {expected}")
        found[field] = value
    return found


def _read_card(folder: Path, counts: ParameterCounts, notes: list[str]) -> Metadata:
    """What the model card says; of a broken one only what the folder's name says."""
    # The package logs what it guesses from names; that is not this program's output.
    logging.getLogger("metadata").setLevel(logging.ERROR)
    card: dict[str, Any] = {}
    try:
        if is_there(folder / "README.md"):
            read_text(folder / "README.md")
        card = Metadata.load_model_card(folder)
    except Exception as error:  # whatever its parsing of a foreign YAML text ends in
        reason = " ".join(str(error).split())[:200]
        path = folder / "README.md"
        notes.append(f"{path}: the model card cannot be read, and is left out: {reason}")
    for known in (card, {}):
        try:
            return Metadata.apply_metadata_heuristic(
                Metadata(),
                known,
                Metadata.load_hf_parameters(folder),
                Path(folder_name(folder)),  # what a name says of itself: "…-26B-A4B-it"
                counts.total,
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            notes.append(f"{folder}: the model card is not understood, and is left out: {reason}")
    return Metadata()


def _add_general(
    keys: GGUFWriter,
    metadata: Metadata,
    file_type: LlamaFileType,
    counts: ParameterCounts,
    general: Mapping[str, Any],
) -> None:
    """`general.*`: what the model is, and what its card says of licence and origin."""
    keys.add_type("model")
    metadata.size_label = counts.size_label
    for field, value in general.items():
        setattr(metadata, field, value)
    metadata.set_gguf_meta_model(keys)
    keys.add_file_type(file_type)
    keys.add_quantization_version(QUANTIZATION_VERSION)


def _add_model(keys: GGUFWriter, config: ModelConfig) -> None:
    """`diffusion-gemma.*`: sizes and constants of the network."""
    keys.add_block_count(len(config.layers))
    keys.add_context_length(config.context_length)
    keys.add_embedding_length(config.hidden)
    keys.add_feed_forward_length(config.feed_forward)
    keys.add_head_count(config.n_heads)
    keys.add_head_count_kv([layer.n_kv_heads for layer in config.layers])
    keys.add_key_length(config.full_head_dim)
    keys.add_value_length(config.full_head_dim)
    keys.add_key_length_swa(config.sliding_head_dim)
    keys.add_value_length_swa(config.sliding_head_dim)
    keys.add_sliding_window(config.sliding_window)
    keys.add_sliding_window_pattern([layer.sliding for layer in config.layers])
    keys.add_layer_norm_rms_eps(config.rms_eps)
    keys.add_causal_attention(False)
    keys.add_shared_kv_layers(0)
    keys.add_embedding_length_per_layer_input(0)
    keys.add_rope_freq_base(config.full_rope.theta)
    keys.add_rope_freq_base_swa(config.sliding_rope.theta)
    keys.add_rope_dimension_count(config.full_head_dim)
    keys.add_rope_dimension_count_swa(config.sliding_head_dim)
    keys.add_expert_count(config.experts)
    keys.add_expert_used_count(config.experts_used)
    keys.add_expert_feed_forward_length(config.expert_feed_forward)
    keys.add_final_logit_softcapping(config.softcap)


def _sampling(folder: Path, generation: dict[str, Any]) -> dict[str, int | float]:
    """Defaults of the entropy-bound sampler, as far as generation_config.json has them."""
    sampler = generation.get("sampler_config") or {}
    if not isinstance(sampler, dict):
        raise ConvertError(f"{folder}/generation_config.json: sampler_config must be an object")
    steps = generation.get("max_denoising_steps")
    stability = generation.get("stability_threshold")
    confidence = generation.get("confidence_threshold")
    found: dict[str, int | float] = {}
    most = {name: option.option.high for name, option in declared(SamplingOptions).items()}
    for key, kinds, low, high, value in (
        ("eb_max_steps", (int,), 1, most["max_denoising_steps"], steps),
        ("eb_t_min", (int, float), 1e-6, MAX_NUMBER, generation.get("t_min")),
        ("eb_t_max", (int, float), 1e-6, MAX_NUMBER, generation.get("t_max")),
        ("eb_entropy_bound", (int, float), 1e-12, MAX_NUMBER, sampler.get("entropy_bound")),
        ("eb_stability_threshold", (int,), 0, most["stability_threshold"], stability),
        ("eb_confidence_threshold", (int, float), 1e-12, MAX_NUMBER, confidence),
    ):
        if value is None:
            continue
        if type(value) not in kinds or not low <= value <= high:
            raise ConvertError(
                f"{folder}/generation_config.json: {key.removeprefix('eb_')} is {value!r}; "
                f"expected {'an integer' if kinds == (int,) else 'a number'} "
                f"from {low:g} to {high}"
            )
        found[key] = value if kinds == (int,) else float(value)
    return found


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    generation = read_json(path) if is_there(path) else {}
    if not isinstance(generation, dict):
        raise ConvertError(f"{path}: must be a JSON object")
    return generation
