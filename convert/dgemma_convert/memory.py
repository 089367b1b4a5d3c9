"""How much memory a file will need to run, before it is written.

An upper bound for any backend; `dgemma inspect` asks the engine itself, once the file is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf.gguf_writer import GGUFValue

from .metadata import ARCHITECTURE

CONTEXT = 8192  # the default of the commands that run a model
# Of the sliding layers' rings beyond their window: a batch of a prompt, and what can be taken back.
RING_SLACK = 1024
CACHE_BYTES = 2  # of an element: float16
WORKING_MEMORY = 512 << 20


def needed(keys: Mapping[str, GGUFValue], n_bytes: int, n_ctx: int = CONTEXT) -> int | None:
    """Bytes for weights of `n_bytes`, cache and working memory; None where `keys` lack a size."""

    def value(name: str) -> Any:
        return keys[f"{ARCHITECTURE}.{name}"].value

    try:
        pattern, heads = value("attention.sliding_window_pattern"), value("attention.head_count_kv")
        n_layers, window = value("block_count"), value("attention.sliding_window")
        if not isinstance(heads, list):
            heads = [heads] * n_layers
        dims = {
            False: value("attention.key_length") + value("attention.value_length"),
            True: value("attention.key_length_swa") + value("attention.value_length_swa"),
        }
    except KeyError:
        return None
    slots = {False: n_ctx, True: min(n_ctx, window + RING_SLACK)}
    cache = sum(
        slots[sliding] * n_heads * dims[sliding]
        for sliding, n_heads in zip(pattern, heads, strict=False)
    )
    return n_bytes + CACHE_BYTES * int(cache) + WORKING_MEMORY
