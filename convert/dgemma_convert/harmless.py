"""Tensors of a checkpoint that the model does not need: buffers that some programs save along.

What a buffer says is compared with config.json: one that says something else would change the
answer, and is left where it is, to be refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig, Rope
from .errors import ConvertError
from .sources import LeftOut, PlainSource, Source, read_floats

ROTARY = re.compile(r"(.*\.)?rotary_emb(_local)?\.(\w*_)?(inv_freq|cos_cached|sin_cached)\Z")
POSITIONS = re.compile(r"(.*\.)?position_ids\Z")
MASKS = re.compile(r"(.*\.)?(causal_mask|attn_mask|attention_mask|masked_bias)\Z")
EMBED_SCALE = re.compile(r"(.*\.)?embed_tokens\.embed_scale\Z|(.*\.)?embed_scale\Z")
TOLERANCE = 1e-2  # bfloat16 keeps two to three digits


def harmless(rest: dict[str, Source], config: ModelConfig) -> Iterator[LeftOut]:
    """Takes what changes nothing out of `rest`, kind by kind."""
    found: dict[str, list[PlainSource]] = {}
    for name, source in list(rest.items()):
        what = _what(name, source, config)
        if what is not None and isinstance(source, PlainSource):
            found.setdefault(what, []).append(source)
            del rest[name]
    for what, sources in found.items():
        yield LeftOut.of(what, [source.stored for source in sources])


def _what(name: str, source: Source, config: ModelConfig) -> str | None:
    """What kind of buffer it is; None where it is none, or says something of its own."""
    if not isinstance(source, PlainSource):
        return None
    if math.prod(source.stored.shape) == 0:
        return "empty tensors"
    if POSITIONS.match(name):
        return "position ids"
    if MASKS.match(name):
        return "masks"
    if EMBED_SCALE.match(name):
        values = _values(source)
        if values is not None and np.allclose(values, config.hidden**0.5, rtol=TOLERANCE):
            return "the embedding's scale"
    match = ROTARY.match(name)
    if match and (match[4] != "inv_freq" or _is_known_rotary(_values(source), config)):
        return "rotary tables"
    return None


def _values(source: PlainSource) -> NDArray[np.float32] | None:
    try:
        return read_floats(source.stored).reshape(-1)
    except ConvertError:
        return None


def _is_known_rotary(values: NDArray[np.float32] | None, config: ModelConfig) -> bool:
    """Whether these are the frequencies that config.json asks for, of either kind of layer."""
    if values is None:
        return False

    def frequencies(rope: Rope, head_dim: int) -> NDArray[np.float64]:
        pairs = np.arange(head_dim // 2)
        return np.where(pairs < rope.n_rotated_pairs, rope.theta ** (-2.0 * pairs / head_dim), 0.0)

    for rope, head_dim in (
        (config.sliding_rope, config.sliding_head_dim),
        (config.full_rope, config.full_head_dim),
    ):
        expected = frequencies(rope, head_dim)
        for candidate in (expected, expected[: rope.n_rotated_pairs]):
            if len(values) == len(candidate) and np.allclose(values, candidate, rtol=TOLERANCE):
                return True
    return False
