"""The smallest model that has every part: 40 KB of random weights, for fuzzing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import support.gguf_builder as b

EMBD, FF, EXPERTS, FF_EXPERT, VOCAB, CANVAS = 32, 32, 2, 32, 64, 8
HEADS, HEAD_DIM = 2, 16
LAYERS = (True, False)  # sliding
A = "diffusion-gemma."


def _keys() -> list[bytes]:
    integers = {
        "block_count": len(LAYERS),
        "context_length": 128,
        "embedding_length": EMBD,
        "feed_forward_length": FF,
        "attention.head_count": HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.key_length_swa": HEAD_DIM,
        "attention.value_length_swa": HEAD_DIM,
        "attention.sliding_window": 8,
        "expert_count": EXPERTS,
        "expert_used_count": 1,
        "expert_feed_forward_length": FF_EXPERT,
    }
    floats = {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0,
    }
    tokens = [f"<{i}>" for i in range(VOCAB - 1)] + ["<turn|>"]
    t = "tokenizer.ggml."
    return [
        b.key("general.architecture", b.STRING, "diffusion-gemma"),
        b.key("general.name", b.STRING, "small"),
        *(b.key(A + name, b.UINT32, number) for name, number in integers.items()),
        *(b.key(A + name, b.FLOAT32, number) for name, number in floats.items()),
        b.array(A + "attention.head_count_kv", b.INT32, [1] * len(LAYERS)),
        b.array(A + "attention.sliding_window_pattern", b.BOOL, LAYERS),
        b.key("diffusion.canvas_length", b.UINT32, CANVAS),
        b.key("diffusion.eb_max_steps", b.UINT32, 4),
        b.key("diffusion.eb_t_min", b.FLOAT32, 0.4),
        b.key("diffusion.eb_t_max", b.FLOAT32, 0.8),
        b.key("diffusion.eb_entropy_bound", b.FLOAT32, 0.1),
        b.key("diffusion.eb_stability_threshold", b.UINT32, 1),
        b.key("diffusion.eb_confidence_threshold", b.FLOAT32, 0.005),
        b.key(t + "model", b.STRING, "gemma4"),
        b.array(t + "tokens", b.STRING, tokens),
        b.array(t + "token_type", b.INT32, [1] * VOCAB),
        b.array(t + "scores", b.FLOAT32, [0.0] * VOCAB),
        b.array(t + "merges", b.STRING, []),
        b.key(t + "bos_token_id", b.UINT32, 2),
        b.key(t + "eos_token_id", b.UINT32, 1),
        b.array(t + "eos_token_ids", b.INT32, [1, VOCAB - 1]),
        b.key(t + "add_bos_token", b.BOOL, 1),
        b.key("tokenizer.chat_template", b.STRING, "{{ messages }}"),
    ]


def _shapes() -> dict[str, tuple[int, ...]]:
    """Shapes by name, rows first."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, EMBD),
        "output_norm.weight": (EMBD,),
        "self_cond_pre_norm.weight": (EMBD,),
        "self_cond_gate.weight": (FF, EMBD),
        "self_cond_up.weight": (FF, EMBD),
        "self_cond_down.weight": (EMBD, FF),
        "rope_freqs.weight": (HEAD_DIM // 2,),
    }
    for i, sliding in enumerate(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_q.weight": (HEADS * HEAD_DIM, EMBD),
            "attn_k.weight": (HEAD_DIM, EMBD),
            "attn_q_norm.weight": (HEAD_DIM,),
            "attn_k_norm.weight": (HEAD_DIM,),
            "attn_output.weight": (EMBD, HEADS * HEAD_DIM),
            "ffn_gate.weight": (FF, EMBD),
            "ffn_up.weight": (FF, EMBD),
            "ffn_down.weight": (EMBD, FF),
            "ffn_gate_inp.weight": (EXPERTS, EMBD),
            "ffn_gate_inp.scale": (EMBD,),
            "ffn_gate_up_exps.weight": (EXPERTS, 2 * FF_EXPERT, EMBD),
            "ffn_down_exps.weight": (EXPERTS, EMBD, FF_EXPERT),
            "ffn_down_exps.scale": (EXPERTS,),
            "layer_output_scale.weight": (1,),
            "enc_layer_output_scale.weight": (1,),
        }
        if sliding:
            layer["attn_v.weight"] = (HEAD_DIM, EMBD)
        norms = "attn_norm post_attention_norm ffn_norm pre_ffw_norm_2 post_ffw_norm"
        for norm in [*norms.split(), "post_ffw_norm_1", "post_ffw_norm_2"]:
            layer[f"{norm}.weight"] = (EMBD,)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _data(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[int, bytes]:
    """Type and bytes: norms and scales near 1, matrices in Q8_0."""
    if len(shape) == 1 or "gate_inp" in name:
        values = rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.normal(size=shape)
        if name == "rope_freqs.weight":
            values = np.where(np.arange(shape[0]) < shape[0] // 2, 1.0, 1e30)
        return b.F32, values.astype(np.float32).tobytes()
    blocks = np.zeros(int(np.prod(shape)) // 32, [("scale", "<f2"), ("codes", "i1", 32)])
    blocks["scale"] = 0.002
    blocks["codes"] = rng.integers(-127, 128, (len(blocks), 32))
    return b.Q8_0, blocks.tobytes()


def write(path: Path) -> Path:
    """Writes the model; the same bytes each time."""
    rng = np.random.default_rng(0)
    tensors, data = [], b""
    for name, shape in _shapes().items():
        type, content = _data(name, shape, rng)
        tensors.append(b.tensor(name, shape[::-1], type, offset=len(data)))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(b.gguf(_keys(), tensors, data))
    return path
