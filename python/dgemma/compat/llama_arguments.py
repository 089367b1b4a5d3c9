"""Constructor arguments of `llama-cpp-python` that this engine does not have itself.

A program written for it should load here unchanged. What cannot change an answer is taken and does
nothing; what asks for something that does not exist here is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# How work is cut up and where it runs: answers are the same whatever these say.
_WITHOUT_EFFECT = frozenset((
    *("n_ubatch", "n_threads_batch", "offload_kqv", "op_offload", "flash_attn", "swa_full"),
    *("no_perf", "numa", "last_n_tokens_size", "spm_infill", "lora_scale"),
))  # fmt: skip

_POSITIONS = "positions are encoded as the file says"
_ONE_GPU = "one GPU is used, or none"
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "split_mode": ((0, 1), _ONE_GPU),
    "main_gpu": ((0,), f"{_ONE_GPU}; choose it with CUDA_VISIBLE_DEVICES"),
    "tensor_split": ((), _ONE_GPU),
    "rpc_servers": ((), "the engine works on one machine"),
    "use_mlock": ((False,), "pages are not locked; the file stays in the page cache while it fits"),
    "vocab_only": ((False,), "`dgemma.File` reads a file without loading the model"),
    "kv_overrides": ((), "change the metadata of the file itself"),
    "logits_all": ((False,), "use `session().canvas_logits`"),
    "embedding": ((False,), "the model writes text and gives no embeddings"),
    "pooling_type": ((-1, 0), "the model writes text and gives no embeddings"),
    "rope_scaling_type": ((-1, 0), _POSITIONS),
    "rope_freq_base": ((0, 0.0), _POSITIONS),
    "rope_freq_scale": ((0, 0.0), _POSITIONS),
    "yarn_ext_factor": ((-1, -1.0), _POSITIONS),
    "yarn_attn_factor": ((1, 1.0), _POSITIONS),
    "yarn_beta_fast": ((32, 32.0), _POSITIONS),
    "yarn_beta_slow": ((1, 1.0), _POSITIONS),
    "yarn_orig_ctx": ((0,), _POSITIONS),
    "lora_base": ((), "merge it while converting: dgemma convert --lora"),
    "lora_path": ((), "merge it while converting: dgemma convert --lora"),
    "chat_format": (("gemma", "chat_template.default"), "the file's own template is used"),
    "chat_handler": ((), "the file's own template is used, and the engine reads text only"),
    "draft_model": ((), "a canvas is drafted as a whole already"),
    "tokenizer": ((), "the file's own tokenizer is used"),
}


def check_constructor(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that ask for what is not here, TypeError for unknown ones."""
    for name, value in arguments.items():
        if name in _WITHOUT_EFFECT or (name in _REFUSED and value is None):
            continue
        if name not in _REFUSED:
            raise TypeError(f"DiffusionGemma() got an unknown argument {name!r}")
        neutral, reason = _REFUSED[name]
        if value not in neutral:
            raise ValueError(f"{name}={value!r} is not supported: {reason}")
