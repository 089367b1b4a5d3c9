"""GGUF files as other programs write them, made key by key from a checkpoint with `gguf`'s writer.

What each writes is taken from logs of files that were published, from descriptions of them and from
what the two branches for llama.cpp load. Nothing of this project's converter is used, but for the
encoders of types that the `gguf` package cannot encode.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from dgemma.quants import quantize

Type = gguf.GGMLQuantizationType
TokenType = gguf.TokenType
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "layer_output_scale.weight": "layer_scalar",
}
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}  # llama.cpp's, for other rows than of 256
BRACKETED = r"<\|.*>|<.*\|>"  # control tokens to #24423's converter, of tools and channels too


@dataclass(frozen=True)
class Layout:
    """What differs from one writer to the next."""

    type_of: Callable[[str, int], Type] = lambda name, layer: Type.BF16  # of matrices
    norm: str = "self_cond_pre_norm"
    encoder_scalars: bool = True
    encoder_as_decoder: bool = False  # the encoder's scalars are the decoder's
    fused: bool = True
    sampler: bool = True  # the keys diffusion.eb_*
    brackets_control: bool = False
    scalar_heads: bool = False  # one number for head_count_kv
    period: int = 0  # one number for the pattern of sliding layers
    merges: bool = True
    model: str = "gemma4"
    published: bool = False  # the keys of one who publishes quantized files


def q4_k_m(name: str, layer: int) -> Type:
    """llama.cpp's mix, with its fall-backs for rows that are not whole blocks of 256."""
    better = layer % 2 == 0
    if name == "token_embd.weight":
        return Type.Q6_K
    if "ffn_down" in name or name == "self_cond_down.weight":
        return Type.Q8_0 if better else Type.Q5_0
    return Type.Q6_K if "attn_v" in name and better else Type.Q4_K


def q8_0(name: str, layer: int) -> Type:
    return Type.Q8_0


LAYOUTS = {
    "24423": Layout(brackets_control=True),
    "24423 without a generation config": Layout(brackets_control=True, sampler=False),
    "24427": Layout(type_of=q8_0, norm="self_cond_norm", encoder_scalars=False, sampler=False),
    "Unsloth": Layout(type_of=q4_k_m, sampler=False, published=True),
    "separate experts": Layout(type_of=q8_0, fused=False),
}


def write_layout(source: Path, path: Path, layout: Layout) -> Path:
    """The model of the checkpoint folder `source`, as one whose habits are `layout` writes it."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    _add_model_keys(writer, config, layout)
    if layout.sampler:
        _add_sampler(writer, json.loads((source / "generation_config.json").read_text()))
    _add_tokenizer(writer, source, config, layout)
    for name, values, layer in _tensors(source, config, layout):
        _add_tensor(writer, name, values, layout.type_of(name, layer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _layers(text: dict[str, Any]) -> Iterator[tuple[bool, int, int]]:
    """Of each layer: whether it slides, its head size and its key-value heads."""
    own = text.get("per_layer_config") or {}
    for i, kind in enumerate(text["layer_types"]):
        sliding = kind == "sliding_attention"
        changed = own.get(str(i), {})
        if not sliding and "global_head_dim" in text:
            changed = {"head_dim": text["global_head_dim"]}
            changed["num_key_value_heads"] = text["num_global_key_value_heads"]
        yield sliding, *({**text, **changed}[k] for k in ("head_dim", "num_key_value_heads"))


def _add_model_keys(writer: gguf.GGUFWriter, config: dict[str, Any], layout: Layout) -> None:
    text = config["text_config"]
    layers = list(_layers(text))
    full = next(layer for layer in layers if not layer[0])
    sliding = next((layer for layer in layers if layer[0]), full)
    ropes = text["rope_parameters"]
    writer.add_type("model")
    writer.add_sampling_top_k(64)
    writer.add_sampling_top_p(0.95)
    writer.add_sampling_temp(1.0)
    writer.add_name("Diffusiongemma 26B A4B It")
    writer.add_basename("diffusiongemma")
    writer.add_size_label("128x2.6B")
    writer.add_license("apache-2.0")
    writer.add_tags(["image-text-to-text"])
    writer.add_block_count(len(layers))
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    heads = [n for _, _, n in layers]
    if layout.scalar_heads:
        assert len(set(heads)) == 1
    writer.add_head_count_kv(heads[0] if layout.scalar_heads else heads)
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_expert_count(text["num_experts"])
    writer.add_expert_used_count(text["top_k_experts"])
    writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    writer.add_key_length(full[1])
    writer.add_value_length(full[1])
    writer.add_key_length_swa(sliding[1])
    writer.add_value_length_swa(sliding[1])
    writer.add_rope_dimension_count(full[1])
    writer.add_rope_dimension_count_swa(sliding[1])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_final_logit_softcapping(text.get("final_logit_softcapping", 30.0))
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_sliding_window(text["sliding_window"])
    pattern = [layer[0] for layer in layers]
    if layout.period:
        assert pattern == [i % layout.period < layout.period - 1 for i in range(len(layers))]
    writer.add_sliding_window_pattern(layout.period or pattern)
    writer.add_causal_attention(False)
    writer.add_uint32("diffusion.canvas_length", config["canvas_length"])
    writer.add_quantization_version(2)
    if layout.published:
        writer.add_quantized_by("Unsloth")
        writer.add_repo_url("https://huggingface.co/unsloth")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
        writer.add_string("quantize.imatrix.file", "diffusiongemma/imatrix_unsloth.gguf")
        writer.add_string("quantize.imatrix.dataset", "unsloth_calibration.txt")
        writer.add_uint32("quantize.imatrix.entries_count", 263)
        writer.add_uint32("quantize.imatrix.chunks_count", 141)


def _add_sampler(writer: gguf.GGUFWriter, generation: dict[str, Any]) -> None:
    sampler = generation.get("sampler_config", {})
    writer.add_uint32("diffusion.eb_max_steps", generation.get("max_denoising_steps", 48))
    writer.add_float32("diffusion.eb_t_min", generation.get("t_min", 0.4))
    writer.add_float32("diffusion.eb_t_max", generation.get("t_max", 0.8))
    writer.add_float32("diffusion.eb_entropy_bound", sampler.get("entropy_bound", 0.1))
    writer.add_uint32("diffusion.eb_stability_threshold", generation.get("stability_threshold", 1))
    threshold = generation.get("confidence_threshold", 0.005)
    writer.add_float32("diffusion.eb_confidence_threshold", threshold)


def _add_tokenizer(
    writer: gguf.GGUFWriter, source: Path, config: dict[str, Any], layout: Layout
) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    ids = dict(content["model"]["vocab"])
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    ids.update({token["content"]: token["id"] for token in content["added_tokens"]})
    n = config["text_config"]["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(n)]
    for token, id in ids.items():
        tokens[id] = token
    types = []
    for token in tokens:
        kind = TokenType.NORMAL
        if token.startswith("<0x") and len(token) == 6:
            kind = TokenType.BYTE
        elif token.startswith("[PAD"):
            kind = TokenType.UNUSED
        elif token in special:
            kind = TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
        if layout.brackets_control and re.fullmatch(BRACKETED, token):
            kind = TokenType.CONTROL
        types.append(kind)
    writer.add_tokenizer_model(layout.model)
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * n)
    writer.add_token_types(types)
    if layout.merges:
        merges = content["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(ids["<bos>"])
    writer.add_eos_token_id(ids["<eos>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_pad_token_id(ids["<pad>"])
    writer.add_mask_token_id(ids["<mask>"])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.add_chat_template((source / "chat_template.jinja").read_text())


def _tensors(
    source: Path, config: dict[str, Any], layout: Layout
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, values and layer of every tensor."""
    text = config["text_config"]
    stored: dict[str, np.ndarray] = {}
    for file in sorted(source.glob("*.safetensors")):
        stored |= {name: tensor.float().numpy() for name, tensor in load_file(file).items()}
    decoder = "model.decoder."
    yield "token_embd.weight", stored[decoder + "embed_tokens.weight"], 0
    yield "output_norm.weight", stored[decoder + "norm.weight"], 0
    conditioning = decoder + "self_conditioning."
    yield layout.norm + ".weight", stored[conditioning + "pre_norm.weight"], 0
    for part in ("gate", "up", "down"):
        yield f"self_cond_{part}.weight", stored[f"{conditioning}{part}_proj.weight"], 0
    layers = list(_layers(text))
    n_pairs = next(size for sliding, size, _ in layers if not sliding) // 2
    rotated = text["rope_parameters"]["full_attention"].get("partial_rotary_factor", 1.0)
    divisors = np.full(n_pairs, 1e30, np.float32)
    divisors[: int(rotated * n_pairs)] = 1.0
    yield "rope_freqs.weight", divisors, 0
    for i in range(len(layers)):
        for name, its in LAYER.items():
            values = stored.get(f"{decoder}layers.{i}.{its}")
            if values is None:
                assert name == "attn_v.weight"
            elif name == "ffn_gate_up_exps.weight" and not layout.fused:
                half = values.shape[1] // 2
                yield f"blk.{i}.ffn_gate_exps.weight", values[:, :half], i
                yield f"blk.{i}.ffn_up_exps.weight", values[:, half:], i
            else:
                yield f"blk.{i}.{name}", values, i
        if layout.encoder_scalars:
            prefix = decoder if layout.encoder_as_decoder else "model.encoder.language_model."
            scalar = stored[f"{prefix}layers.{i}.layer_scalar"]
            yield f"blk.{i}.enc_layer_output_scale.weight", scalar, i


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Type) -> None:
    if values.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        return
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACKS[kind]
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    data, _ = quantize(rows, "f32", kind.name.lower(), *rows.shape)
    writer.add_tensor(name, data.reshape(*values.shape[:-1], -1), raw_dtype=kind)
