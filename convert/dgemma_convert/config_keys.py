"""Which keys of config.json change nothing, so that every other one can be refused.

A key that this converter does not know may ask for another computation. It is let pass only where
its value asks for nothing: null, false, zero or empty.
"""

from __future__ import annotations

from typing import Any

# Of any configuration: what a model is called, how it was saved, trained or is to be run.
_ANYWHERE = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
        "architectures", "attention_dropout", "attn_implementation", "auto_map",
        "cache_implementation", "chunk_size_feed_forward", "dtype", "hidden_dropout",
        "id2label", "initializer_range", "is_encoder_decoder", "label2id", "max_length",
        "model_type", "name_or_path", "output_attentions", "output_hidden_states",
        "output_router_logits", "problem_type", "return_dict", "router_aux_loss_coef",
        "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    }
)  # fmt: skip

TOP = _ANYWHERE | frozenset(
    {
        "text_config", "vision_config", "audio_config", "canvas_length", "quantization_config",
        # Images and sound, which the engine does not read.
        "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_id", "eoa_token_index",
        "eoi_token_id", "image_token_id", "image_token_index", "mm_tokens_per_image",
        "video_token_id", "vision_soft_tokens_per_image",
    }
)  # fmt: skip

TEXT = _ANYWHERE | frozenset(
    {
        "attention_bias", "final_logit_softcapping", "global_head_dim", "head_dim",
        "hidden_activation", "hidden_size", "intermediate_size", "layer_types",
        "max_position_embeddings", "moe_intermediate_size", "num_attention_heads", "num_experts",
        "num_global_key_value_heads", "num_hidden_layers", "num_key_value_heads",
        "per_layer_config", "rms_norm_eps", "rope_parameters", "sliding_window",
        "top_k_experts", "use_bidirectional_attention", "vocab_size",
        "vocab_size_per_layer_input",  # of inputs that this model has none of
    }
)  # fmt: skip

# Keys of the family that are understood in one sense only.
TEXT_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_k_eq_v": (None, True),
    "enable_moe_block": (None, True),
    "hidden_size_per_layer_input": (None, 0),
    "num_kv_shared_layers": (None, 0),
    "use_double_wide_mlp": (None, False),
}

ROPE = frozenset({"rope_type", "rope_theta", "partial_rotary_factor", "factor"})


def asks_for_nothing(value: Any) -> bool:
    """Whether a key with this value is as good as none."""
    return value is None or value is False or value in (0, "", [], {})
