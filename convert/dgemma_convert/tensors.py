"""The tensor table: a tensor's name in the checkpoint, its name in GGUF, and its shape.

Every tensor of the checkpoint must be in the table, and every tensor of the table in the
checkpoint; only the vision tower, which the engine does not run, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dgemma.tensor_kinds import Kind, kind_of

from .checkpoint import Checkpoint
from .config import Layer, ModelConfig
from .errors import ConvertError
from .harmless import harmless
from .quantized import Sources
from .safetensors_file import StoredTensor
from .sources import ArraySource, LeftOut, PlainSource, Source, same_bytes

# Divides a frequency into nothing: pairs beyond the rotated ones stay where they are.
NOT_ROTATED = 1e30


class Row(NamedTuple):
    """One line of the table: names without their layer's prefix, shape in words of `_sizes`."""

    gguf: str
    checkpoint: str
    shape: str

    @property
    def kind(self) -> Kind:
        """What the tensor is for."""
        return kind_of(self.gguf)


MODEL_ROWS = (
    Row("token_embd.weight", "embed_tokens.weight", "vocab hidden"),
    Row("output_norm.weight", "norm.weight", "hidden"),
    Row("self_cond_pre_norm.weight", "self_conditioning.pre_norm.weight", "hidden"),
    Row("self_cond_gate.weight", "self_conditioning.gate_proj.weight", "feed_forward hidden"),
    Row("self_cond_up.weight", "self_conditioning.up_proj.weight", "feed_forward hidden"),
    Row("self_cond_down.weight", "self_conditioning.down_proj.weight", "hidden feed_forward"),
)

LAYER_ROWS = (
    Row("attn_norm.weight", "input_layernorm.weight", "hidden"),
    Row("attn_q.weight", "self_attn.q_proj.weight", "queries hidden"),
    Row("attn_k.weight", "self_attn.k_proj.weight", "keys hidden"),
    Row("attn_v.weight", "self_attn.v_proj.weight", "keys hidden"),
    Row("attn_q_norm.weight", "self_attn.q_norm.weight", "head_dim"),
    Row("attn_k_norm.weight", "self_attn.k_norm.weight", "head_dim"),
    Row("attn_output.weight", "self_attn.o_proj.weight", "hidden queries"),
    Row("post_attention_norm.weight", "post_attention_layernorm.weight", "hidden"),
    Row("ffn_norm.weight", "pre_feedforward_layernorm.weight", "hidden"),
    Row("ffn_gate.weight", "mlp.gate_proj.weight", "feed_forward hidden"),
    Row("ffn_up.weight", "mlp.up_proj.weight", "feed_forward hidden"),
    Row("ffn_down.weight", "mlp.down_proj.weight", "hidden feed_forward"),
    Row("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight", "hidden"),
    Row("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight", "hidden"),
    Row("ffn_gate_inp.weight", "router.proj.weight", "experts hidden"),
    Row("ffn_gate_inp.scale", "router.scale", "hidden"),
    Row("ffn_gate_up_exps.weight", "experts.gate_up_proj", "experts gate_and_up hidden"),
    Row("ffn_down_exps.weight", "experts.down_proj", "experts hidden expert_width"),
    Row("ffn_down_exps.scale", "router.per_expert_scale", "experts"),
    Row("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight", "hidden"),
    Row("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "hidden"),
    Row("layer_output_scale.weight", "layer_scalar", "one"),
)

# Where the experts are stored as separate gate and up projections, these stand for the fused line.
SPLIT_EXPERT_ROWS = (
    Row("ffn_gate_exps.weight", "experts.gate_proj", "experts expert_width hidden"),
    Row("ffn_up_exps.weight", "experts.up_proj", "experts expert_width hidden"),
)
_WRAPPED = re.compile(r"((module|_orig_mod|_fsdp_wrapped_module)\.)*(model\.)?")
FUSED_EXPERTS = "experts.gate_up_proj"


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of the new file, not yet encoded."""

    name: str  # in the GGUF
    kind: Kind
    source: Source


@dataclass(frozen=True)
class TensorMap:
    """All tensors in the order of the file, and those left out."""

    tensors: list[MappedTensor]
    left_out: list[LeftOut]


def _sizes(config: ModelConfig, layer: Layer | None = None) -> dict[str, int]:
    """What the words of the table's shapes stand for."""
    sizes = {
        "one": 1,
        "hidden": config.hidden,
        "vocab": config.vocab,
        "feed_forward": config.feed_forward,
        "experts": config.experts,
        "expert_width": config.expert_feed_forward,
        "gate_and_up": 2 * config.expert_feed_forward,
    }
    if layer is not None:
        sizes["head_dim"] = layer.head_dim
        sizes["queries"] = config.n_heads * layer.head_dim
        sizes["keys"] = layer.n_kv_heads * layer.head_dim
    return sizes


def layer_rows(layer: Layer, split_experts: bool) -> Iterator[Row]:
    """The table's lines for one layer."""
    for row in LAYER_ROWS:
        if row.checkpoint == FUSED_EXPERTS and split_experts:
            yield from SPLIT_EXPERT_ROWS
        elif row.gguf != "attn_v.weight" or layer.sliding:
            yield row


def row_shape(config: ModelConfig, row: Row, layer: Layer | None = None) -> tuple[int, ...]:
    """The shape that a line of the table asks for."""
    sizes = _sizes(config, layer)
    return tuple(sizes[word] for word in row.shape.split())


def rope_divisors(config: ModelConfig) -> ArraySource:
    """`rope_freqs.weight`: (head_dim/2) divisors of the full layers' frequencies."""
    divisors = np.full(config.full_head_dim // 2, NOT_ROTATED, np.float32)
    divisors[: config.full_rope.n_rotated_pairs] = 1.0
    return ArraySource("rope_freqs.weight", divisors)


def map_tensors(config: ModelConfig, checkpoint: Checkpoint, sources: Sources) -> TensorMap:
    """Finds every tensor of the table among the checkpoint's `sources`.

    ConvertError where one is missing, has the wrong shape, or is not in the table.
    """
    prefix = _prefix(checkpoint)
    decoder, encoder = prefix + "decoder.", prefix + "encoder.language_model."
    rest = dict(sources.tensors)
    tensors: list[MappedTensor] = []

    def take(gguf_name: str, name: str, kind: Kind, shape: tuple[int, ...]) -> None:
        source = rest.pop(name, None)
        if source is None:
            raise ConvertError(
                f"{checkpoint.folder}: tensor {name} is missing; expected {list(shape)}"
            )
        if source.shape != shape:
            raise ConvertError(
                f"{checkpoint.folder}: tensor {name} has the shape {list(source.shape)}; "
                f"config.json asks for {list(shape)}"
            )
        tensors.append(MappedTensor(gguf_name, kind, source))

    for row in MODEL_ROWS:
        take(row.gguf, decoder + row.checkpoint, row.kind, row_shape(config, row))
    for i, layer in enumerate(config.layers):
        own = f"{decoder}layers.{i}."
        split = own + FUSED_EXPERTS not in rest and own + "experts.gate_proj" in rest
        for row in layer_rows(layer, split):
            shape = row_shape(config, row, layer)
            take(f"blk.{i}.{row.gguf}", own + row.checkpoint, row.kind, shape)
        take(
            f"blk.{i}.enc_layer_output_scale.weight",
            f"{encoder}layers.{i}.layer_scalar",
            Kind.VECTOR,
            (1,),
        )

    # Made only now that the head size is known to be that of real tensors, not any number.
    frequencies = MappedTensor("rope_freqs.weight", Kind.VECTOR, rope_divisors(config))
    tensors.insert(len(MODEL_ROWS), frequencies)

    left_out = [
        *_leave_out(
            rest, "vision", (prefix + "encoder.vision_tower.", prefix + "encoder.embed_vision.")
        ),
        *_leave_out_copies(rest, checkpoint, prefix),
        *_unused("scales of activations", sources.activation_scales),
        *checkpoint.left_out,
        *harmless(rest, config),
    ]
    for name, source in rest.items():
        raise ConvertError(
            f"{checkpoint.folder}: tensor {name} {list(source.shape)} has no place in a "
            "DiffusionGemma model of this config.json"
        )
    return TensorMap(tensors, left_out)


def _prefix(checkpoint: Checkpoint) -> str:
    """What stands before "decoder.": "model.", or "" where the model was saved without a head.

    Before that programs put their wrappers' names, such as "module." and "_orig_mod.".
    """
    embedding = "decoder.embed_tokens.weight"
    for name in checkpoint.tensors:
        prefix = name.removesuffix(embedding)
        if prefix != name and _WRAPPED.fullmatch(prefix):
            return prefix
    raise ConvertError(
        f"{checkpoint.folder}: tensor model.decoder.embed_tokens.weight is missing; this is not a "
        "DiffusionGemma checkpoint"
    )


def _leave_out(rest: dict[str, Source], what: str, prefixes: tuple[str, ...]) -> Iterator[LeftOut]:
    stored = []
    for name in [name for name in rest if name.startswith(prefixes)]:
        source = rest.pop(name)
        if isinstance(source, PlainSource):
            stored.append(source.stored)
    yield from _unused(what, stored)


def _unused(what: str, stored: Sequence[StoredTensor]) -> Iterator[LeftOut]:
    if stored:
        yield LeftOut.of(what, stored, named=False)


def _leave_out_copies(
    rest: dict[str, Source], checkpoint: Checkpoint, prefix: str
) -> Iterator[LeftOut]:
    """Tied weights that were saved twice: left out once they are known to be equal."""
    decoder, encoder = prefix + "decoder.", prefix + "encoder.language_model."
    n_tensors = n_bytes = 0
    for name in list(rest):
        if name == prefix.removesuffix("model.") + "lm_head.weight":
            original = decoder + "embed_tokens.weight"
        elif name.startswith(encoder):
            original = decoder + name[len(encoder) :]
        else:
            continue
        copy, first = checkpoint.tensors[name], checkpoint.tensors.get(original)
        if first is None:
            continue
        if not same_bytes(copy, first):
            raise ConvertError(
                f"{checkpoint.folder}: tensor {name} differs from {original}; a model whose "
                "weights are not tied cannot be converted"
            )
        del rest[name]
        n_tensors, n_bytes = n_tensors + 1, n_bytes + copy.n_bytes
    if n_tensors:
        yield LeftOut("copies of tied weights", n_tensors, n_bytes)
