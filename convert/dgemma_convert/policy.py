"""Which type each kind of tensor gets, for every `--outtype`.

Norms, scales and the router are float32 in every file: they are 0.05 % of the weights, and the
router's choice of experts is the one place where a rounding error changes everything behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from dgemma.tensor_kinds import Kind

from .errors import ConvertError

Type = GGMLQuantizationType


# llama.cpp reads a multiplier beside the weights of these kinds only, so NVFP4 can be had in full
# accuracy only there.
WITH_MULTIPLIER = frozenset(
    {Kind.ATTENTION, Kind.MLP, Kind.EXPERTS_GATE_UP, Kind.EXPERTS_DOWN},
)


@dataclass(frozen=True)
class Mix:
    """Types of a whole file: `default`, except where `kinds` says otherwise.

    Without a default every tensor keeps the type it has.
    """

    default: Type | None
    file_type: LlamaFileType
    kinds: dict[Kind, Type] = field(default_factory=dict)


# What every token passes through (embedding and head, attention, dense MLP, self-conditioning) is a
# tenth of the released model; the experts, of which a token uses 8 in 128, are the rest. Errors in
# that tenth cost most: docs/mixes.md has the measurement. So the mixes keep it in better types.
# Names end as those of llama.cpp do: _s for one type throughout (but for the embedding), _m for a
# better type in that tenth, _l for Q8_0 there.
_EVERY_TOKEN = (Kind.EMBEDDING, Kind.SELF_CONDITIONING, Kind.ATTENTION, Kind.MLP)


def _mix(experts: Type, others: Type, file_type: LlamaFileType) -> Mix:
    return Mix(experts, file_type, dict.fromkeys(_EVERY_TOKEN, others))


MIXES = {
    "auto": Mix(None, LlamaFileType.GUESSED),
    "f32": Mix(Type.F32, LlamaFileType.ALL_F32),
    "f16": Mix(Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Mix(Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Mix(Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": Mix(Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_s": Mix(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S, {Kind.EMBEDDING: Type.Q6_K}),
    "q4_k_s": Mix(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, {Kind.EMBEDDING: Type.Q6_K}),
    "q3_k_s": Mix(Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_S, {Kind.EMBEDDING: Type.Q6_K}),
    "q5_k_m": _mix(Type.Q5_K, Type.Q6_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": _mix(Type.Q4_K, Type.Q6_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q3_k_m": _mix(Type.Q3_K, Type.Q5_K, LlamaFileType.MOSTLY_Q3_K_M),
    "q2_k": _mix(Type.Q2_K, Type.Q4_K, LlamaFileType.MOSTLY_Q2_K),
    # For cards of 12 GB: what is left of 11.5 GiB, and of 10.5, once the experts' down projections
    # have the smallest type that fits their rows.
    "iq3_xxs": _mix(Type.IQ3_XXS, Type.Q6_K, LlamaFileType.MOSTLY_IQ3_XXS),
    "iq2_s": _mix(Type.IQ2_S, Type.Q6_K, LlamaFileType.MOSTLY_IQ2_S),
    "iq4_xs": _mix(Type.IQ4_XS, Type.Q6_K, LlamaFileType.MOSTLY_IQ4_XS),
    "iq4_xs_l": _mix(Type.IQ4_XS, Type.Q8_0, LlamaFileType.MOSTLY_IQ4_XS),
    # The plain types: one type throughout but for the embedding, whose error is the logits' own.
    "q5_1": Mix(Type.Q5_1, LlamaFileType.MOSTLY_Q5_1, {Kind.EMBEDDING: Type.Q6_K}),
    "q5_0": Mix(Type.Q5_0, LlamaFileType.MOSTLY_Q5_0, {Kind.EMBEDDING: Type.Q6_K}),
    "q4_1": Mix(Type.Q4_1, LlamaFileType.MOSTLY_Q4_1, {Kind.EMBEDDING: Type.Q6_K}),
    "q4_0": Mix(Type.Q4_0, LlamaFileType.MOSTLY_Q4_0, {Kind.EMBEDDING: Type.Q6_K}),
    "iq4_nl": Mix(Type.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL, {Kind.EMBEDDING: Type.Q6_K}),
    "nvfp4": Mix(
        Type.NVFP4,
        LlamaFileType.MOSTLY_NVFP4,
        {Kind.EMBEDDING: Type.Q8_0, Kind.SELF_CONDITIONING: Type.Q8_0},
    ),
}

# The best that stays below 15 GB (docs/mixes.md).
DEFAULT_MIX = "iq4_xs_l"

# What to call a file most of whose weights are of a type.
FILE_TYPES = {
    Type.IQ2_XS: LlamaFileType.MOSTLY_IQ2_XS,
    Type.IQ3_S: LlamaFileType.MOSTLY_IQ3_S,
    **{mix.default: mix.file_type for mix in MIXES.values() if mix.default is not None},
}

# What a row gets whose width is not a whole number of blocks: the next type of about the same size
# or better, with smaller blocks. Every chain ends in a type without blocks.
FALLBACKS = {
    Type.NVFP4: Type.Q4_0,
    Type.Q4_0: Type.F16,
    Type.Q4_1: Type.F16,
    Type.Q5_0: Type.F16,
    Type.Q5_1: Type.F16,
    Type.Q8_0: Type.F16,
    Type.IQ4_NL: Type.F16,
    Type.IQ2_XS: Type.IQ4_NL,
    Type.IQ2_S: Type.IQ4_NL,
    Type.IQ3_XXS: Type.IQ4_NL,
    Type.IQ3_S: Type.IQ4_NL,
    Type.Q2_K: Type.IQ4_NL,
    Type.Q3_K: Type.IQ4_NL,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}

TYPES = tuple(sorted({Type.F32, Type.F16, Type.BF16, *FALLBACKS}))


def type_named(name: str) -> Type:
    """The tensor type called `name` in any case; ConvertError where it cannot be written."""
    for candidate in TYPES:
        if candidate.name == name.upper():
            return candidate
    known = " ".join(t.name.lower() for t in TYPES)
    raise ConvertError(f"{name!r} is not a type that can be written; expected one of {known}")


def row_bytes(tensor_type: Type, n_cols: int) -> int:
    """Bytes of a row of `n_cols` elements, which are a whole number of blocks."""
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    return n_cols // block_size * block_bytes


def fitting(tensor_type: Type, n_cols: int) -> Type:
    """`tensor_type`, or the first of its fall-backs whose blocks fit rows of `n_cols` elements."""
    while n_cols % GGML_QUANT_SIZES[tensor_type][0]:
        tensor_type = FALLBACKS[tensor_type]
    return tensor_type


@dataclass(frozen=True)
class Policy:
    """The user's wishes: a mix, and exceptions to it.

    `by_name` are (regular expression, type), searched for in the GGUF tensor name; the first that
    is found decides.
    """

    name: str  # of the mix
    mix: Mix
    by_name: Sequence[tuple[re.Pattern[str], Type]] = ()
    token_embedding: Type | None = None

    def wanted(self, name: str, kind: Kind, kept: Type) -> Type:
        """The type for a tensor, before its width is looked at; `kept`: the one it has now."""
        if kind is Kind.VECTOR:
            return Type.F32
        for pattern, tensor_type in self.by_name:
            if pattern.search(name):
                return tensor_type
        if kind is Kind.EMBEDDING and self.token_embedding is not None:
            return self.token_embedding
        wanted = self.mix.kinds.get(kind, self.mix.default)
        return kept if wanted is None else wanted


def make_policy(
    outtype: str, tensor_types: Sequence[str] = (), token_embedding_type: str | None = None
) -> Policy:
    """A policy from command-line words; `tensor_types` are written "REGEX=TYPE"."""
    if outtype not in MIXES:
        raise ConvertError(f"unknown outtype {outtype!r}; expected one of {' '.join(MIXES)}")
    by_name = []
    for rule in tensor_types:
        pattern, equals, name = rule.rpartition("=")
        if not equals or not pattern:
            raise ConvertError(f"--tensor-type {rule!r}: expected REGEX=TYPE")
        try:
            by_name.append((re.compile(pattern), type_named(name)))
        except re.error as error:
            raise ConvertError(
                f"--tensor-type {rule!r}: bad regular expression: {error}"
            ) from error
    embedding = None if token_embedding_type is None else type_named(token_embedding_type)
    return Policy(outtype, MIXES[outtype], by_name, embedding)
