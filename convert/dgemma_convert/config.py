"""A checkpoint's config.json, checked and in one form.

config.json is read as it is, never through `transformers`: there are two ways of writing the sizes
of full-attention layers (`global_head_dim` with `num_global_key_value_heads`, or
`per_layer_config`), and each is understood only by some versions of that package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config_keys import ROPE, TEXT, TEXT_VALUES, TOP, asks_for_nothing
from .errors import ConvertError
from .json_file import read_json

MODEL_TYPE = "diffusion_gemma"
SLIDING, FULL = "sliding_attention", "full_attention"
# `final_logit_softcapping` is a class attribute of the reference's configuration, which saves it
# only where it differs from this value.
DEFAULT_SOFTCAP = 30.0
MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer."""

    sliding: bool
    head_dim: int
    n_kv_heads: int


@dataclass(frozen=True)
class Rope:
    """Rotation of one kind of layer: pairs (i, i + head_dim/2) for i < n_rotated_pairs."""

    theta: float
    n_rotated_pairs: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a DiffusionGemma model; names as in the GGUF keys."""

    hidden: int
    feed_forward: int
    vocab: int
    n_heads: int
    layers: tuple[Layer, ...]
    experts: int
    experts_used: int
    expert_feed_forward: int
    sliding_window: int
    context_length: int
    canvas_length: int
    rms_eps: float
    softcap: float
    full_head_dim: int
    sliding_head_dim: int
    full_rope: Rope
    sliding_rope: Rope
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]


class _Reader:
    """Typed access to a JSON object, with errors that name the key."""

    def __init__(self, path: Path, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ConvertError(f"{path}: {where or 'the file'} must be a JSON object")
        self.path, self.where, self.values = path, where, values

    def fail(self, key: str, expected: str) -> ConvertError:
        """The error for `key`, whose value is not what was `expected`."""
        name = f"{self.where}.{key}" if self.where else key
        found = repr(self.values[key]) if key in self.values else "missing"
        return ConvertError(f"{self.path}: {name} is {found[:80]}; expected {expected}")

    def size(self, key: str) -> int:
        """A positive integer."""
        value = self.values.get(key)
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise self.fail(key, "a positive integer")
        return value

    def number(self, key: str) -> float:
        """A positive, finite number."""
        value = self.values.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise self.fail(key, "a positive number")
        return float(value)

    def token(self, key: str) -> int | None:
        """A token id, or None where there is none."""
        value = self.values.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_SIZE):
            raise self.fail(key, "a token id")
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids, written as one or as a list."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i <= MAX_SIZE for i in ids):
            raise self.fail(key, "a token id or a list of them")
        return tuple(ids)

    def refuse_unknown(self, known: frozenset[str]) -> None:
        """ConvertError where a key is not in `known` and its value asks for something."""
        for key, value in self.values.items():
            if key not in known and not asks_for_nothing(value):
                name = f"{self.where}.{key}" if self.where else key
                raise ConvertError(
                    f"{self.path}: {name} is {str(value)[:80]!r}, which this converter does not "
                    "know and which may change the answers; if you know that it changes nothing, "
                    "remove it"
                )

    def object(self, key: str) -> _Reader:
        """A nested object."""
        name = f"{self.where}.{key}" if self.where else key
        if key not in self.values:
            raise self.fail(key, "a JSON object")
        return _Reader(self.path, name, self.values[key])


def read_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json; ConvertError where it is not a model this converter knows."""
    path = folder / "config.json"
    top = _Reader(path, "", read_json(path))
    if top.values.get("model_type") != MODEL_TYPE:
        raise top.fail("model_type", f"{MODEL_TYPE!r}: only DiffusionGemma can be converted")
    text = top.object("text_config")
    for reader, key, allowed in (
        (top, "tie_word_embeddings", (None, True)),  # False would undo every tie of the encoder too
        (text, "tie_word_embeddings", (None, True)),
        (text, "hidden_activation", ("gelu_pytorch_tanh",)),
        (text, "attention_bias", (None, False)),
        (text, "use_bidirectional_attention", (None, "vision")),  # "vision" concerns images only
        *((text, key, allowed) for key, allowed in TEXT_VALUES.items()),
    ):
        if reader.values.get(key) not in allowed:
            raise reader.fail(key, " or ".join(repr(a) for a in allowed if a is not None) or "null")

    top.refuse_unknown(TOP)
    text.refuse_unknown(TEXT | TEXT_VALUES.keys())
    layers = _layers(text)
    full_dim = _one_head_dim(path, layers, sliding=False)
    ropes = text.object("rope_parameters")
    ropes.refuse_unknown(frozenset({FULL, SLIDING}))
    full_rope = _rope(ropes, FULL, full_dim)
    if any(layer.sliding for layer in layers):
        sliding_dim = _one_head_dim(path, layers, sliding=True)
        sliding_rope = _rope(ropes, SLIDING, sliding_dim)
        if sliding_rope.n_rotated_pairs != sliding_dim // 2:
            raise ConvertError(
                f"{path}: sliding layers with a partial rotary factor have no form in GGUF"
            )
    else:  # the file has keys for sliding layers all the same
        sliding_dim, sliding_rope = full_dim, Rope(full_rope.theta, full_dim // 2)

    n_heads, n_experts = text.size("num_attention_heads"), text.size("num_experts")
    for i, layer in enumerate(layers):
        if n_heads % layer.n_kv_heads or layer.head_dim % 2:
            raise ConvertError(
                f"{path}: layer {i}: {n_heads} heads of {layer.head_dim} over {layer.n_kv_heads} "
                "key-value heads; expected an even head size and a whole number of heads each"
            )
    if text.size("top_k_experts") > n_experts:
        raise text.fail("top_k_experts", f"at most num_experts = {n_experts}")
    if top.size("canvas_length") >= text.size("max_position_embeddings"):
        raise top.fail("canvas_length", "less than max_position_embeddings")
    softcap = "final_logit_softcapping"
    return ModelConfig(
        hidden=text.size("hidden_size"),
        feed_forward=text.size("intermediate_size"),
        vocab=text.size("vocab_size"),
        n_heads=n_heads,
        layers=layers,
        experts=n_experts,
        experts_used=text.size("top_k_experts"),
        expert_feed_forward=text.size("moe_intermediate_size"),
        sliding_window=text.size("sliding_window"),
        context_length=text.size("max_position_embeddings"),
        canvas_length=top.size("canvas_length"),
        rms_eps=text.number("rms_norm_eps"),
        softcap=text.number(softcap) if softcap in text.values else DEFAULT_SOFTCAP,
        full_head_dim=full_dim,
        sliding_head_dim=sliding_dim,
        full_rope=full_rope,
        sliding_rope=sliding_rope,
        bos_token_id=text.token("bos_token_id"),
        pad_token_id=text.token("pad_token_id"),
        eos_token_ids=text.tokens("eos_token_id"),
    )


def _layers(text: _Reader) -> tuple[Layer, ...]:
    n_layers, kinds = text.size("num_hidden_layers"), text.values.get("layer_types")
    if (
        not isinstance(kinds, list)
        or len(kinds) != n_layers
        or any(kind not in (SLIDING, FULL) for kind in kinds)
    ):
        raise text.fail("layer_types", f"{n_layers} times {SLIDING!r} or {FULL!r}")
    # The reference runs the last layer with full attention, whatever the list says.
    kinds = [*kinds[:-1], FULL]

    overrides: dict[int, _Reader] = {}
    if text.values.get("per_layer_config") is not None:
        entries = text.object("per_layer_config")
        for key in entries.values:
            # written with leading zeros ("05") where there are ten layers or more
            if not key.isdecimal() or int(key) >= n_layers:
                raise entries.fail(key, f"layer numbers below {n_layers} as keys")
            own = entries.object(key)
            unknown = own.values.keys() - {"head_dim", "num_key_value_heads"}
            if unknown:
                raise ConvertError(
                    f"{text.path}: {own.where} overrides {', '.join(sorted(unknown))}; only "
                    "head_dim and num_key_value_heads may differ between layers"
                )
            overrides[int(key)] = own
    else:
        n_kv_heads = text.values.get("num_global_key_value_heads")
        own = _Reader(
            text.path,
            text.where,
            {
                "head_dim": text.size("global_head_dim"),
                "num_key_value_heads": text.size(
                    "num_key_value_heads" if n_kv_heads is None else "num_global_key_value_heads"
                ),
            },
        )
        overrides = {i: own for i, kind in enumerate(kinds) if kind == FULL}

    def value(layer: int, key: str) -> int:
        own = overrides.get(layer)
        return own.size(key) if own and key in own.values else text.size(key)

    return tuple(
        Layer(kind == SLIDING, value(i, "head_dim"), value(i, "num_key_value_heads"))
        for i, kind in enumerate(kinds)
    )


def _one_head_dim(path: Path, layers: tuple[Layer, ...], sliding: bool) -> int:
    sizes = {layer.head_dim for layer in layers if layer.sliding == sliding}
    if len(sizes) > 1:
        raise ConvertError(
            f"{path}: layers of one kind have head sizes {sorted(sizes)}; GGUF has room for one"
        )
    return sizes.pop()


def _rope(ropes: _Reader, kind: str, head_dim: int) -> Rope:
    own = ropes.object(kind)
    own.refuse_unknown(ROPE)
    rope_type, factor = own.values.get("rope_type"), own.values.get("partial_rotary_factor", 1.0)
    if rope_type not in ("default", "proportional"):
        raise own.fail("rope_type", "'default' or 'proportional'")
    if type(factor) not in (int, float) or not 0 < factor <= 1:
        raise own.fail("partial_rotary_factor", "a number in (0, 1]")
    if rope_type == "default" and factor != 1:
        # It would rotate with the frequencies of a smaller head: not what rope_freqs can say.
        raise own.fail("partial_rotary_factor", "1 with rope_type 'default'")
    if own.values.get("factor", 1.0) != 1:
        raise own.fail("factor", "1: scaled frequencies are not supported")
    return Rope(own.number("rope_theta"), int(factor * head_dim // 2))
