"""What a tensor of a model file is for, by its name."""

from __future__ import annotations

import re
from enum import Enum


class Kind(Enum):
    """What a tensor is for, as far as its type depends on it."""

    VECTOR = "vector"  # norms, scales, the router, frequencies: always float32
    EMBEDDING = "embedding"  # also the head
    SELF_CONDITIONING = "self_conditioning"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS_GATE_UP = "experts_gate_up"
    EXPERTS_DOWN = "experts_down"


_LAYER_PREFIX = re.compile(r"blk\.\d+\.")
_KINDS = {
    "token_embd.weight": Kind.EMBEDDING,
    "self_cond_gate.weight": Kind.SELF_CONDITIONING,
    "self_cond_up.weight": Kind.SELF_CONDITIONING,
    "self_cond_down.weight": Kind.SELF_CONDITIONING,
    "attn_q.weight": Kind.ATTENTION,
    "attn_k.weight": Kind.ATTENTION,
    "attn_v.weight": Kind.ATTENTION,
    "attn_output.weight": Kind.ATTENTION,
    "ffn_gate.weight": Kind.MLP,
    "ffn_up.weight": Kind.MLP,
    "ffn_down.weight": Kind.MLP,
    "ffn_gate_up_exps.weight": Kind.EXPERTS_GATE_UP,
    "ffn_gate_exps.weight": Kind.EXPERTS_GATE_UP,
    "ffn_up_exps.weight": Kind.EXPERTS_GATE_UP,
    "ffn_down_exps.weight": Kind.EXPERTS_DOWN,
}


def kind_of(gguf_name: str) -> Kind:
    """The kind of a tensor by its name in GGUF; VECTOR where it is none of the large ones."""
    return _KINDS.get(_LAYER_PREFIX.sub("", gguf_name), Kind.VECTOR)
