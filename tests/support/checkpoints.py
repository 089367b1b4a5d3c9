"""Random, well-conditioned DiffusionGemma checkpoints: small, and different in every size.

Random networks are chaotic: with router logits near zero the choice of experts flips on rounding
noise, and an error of 1e-6 grows to 1 within a few layers. The scales chosen in `_draw` (router
logits with a standard deviation of 2, weak `post_*` norms, inputs of unit variance) keep two
correct float32 implementations within about 1e-5 of each other, so that a wrong one stands out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, logging
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaTextConfig,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

logging.set_verbosity_error()

# The real names, in the order of the real vocabulary: 0 pad, 1 end, 2 begin, 3 unknown, 4 mask.
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
TURNS = ["<|turn>", "<turn|>", "<|tool_response>"]
PAD, EOS, BOS, TURN_END = 0, 1, 2, len(SPECIAL) + 1

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes of a checkpoint, and how it is written. `layers`: a string of s(liding), f(ull)."""

    name: str
    hidden: int
    layers: str
    heads: int
    head_dim: int
    kv_heads: int
    full_head_dim: int
    full_kv_heads: int
    mlp: int
    experts: int
    top_k: int
    expert_mlp: int
    window: int
    canvas: int
    vocab: int
    eps: float = 1e-6
    softcap: float = 30.0
    theta: float = 1e4
    full_theta: float = 1e6
    rotary: float = 0.25
    post_norm: float = 0.3  # strength of what layers add to the residual stream
    logit_gain: float = 1.0  # of the final norm: how peaked the predictions are
    end_tokens: tuple[int, ...] = (EOS, TURN_END)
    dtype: torch.dtype = torch.float32
    old_keys: bool = False  # global_head_dim, … instead of per_layer_config
    max_shard_size: str = "5GB"
    seed: int = 0


SPECS = {
    spec.name: spec
    for spec in (
        # Like the released model: one full layer at the end, a window longer than the canvas.
        Spec("small", hidden=64, layers="ssf", heads=4, head_dim=16, kv_heads=2, full_head_dim=32,
             full_kv_heads=1, mlp=96, experts=8, top_k=2, expert_mlp=32, window=24, canvas=16,
             vocab=331, seed=1),
        # Everything a multiple of 256, so that K-quants apply; consecutive full layers; old keys.
        Spec("wide", hidden=256, layers="sffsf", heads=8, head_dim=32, kv_heads=4, full_head_dim=64,
             full_kv_heads=2, mlp=512, experts=6, top_k=3, expert_mlp=256, window=11, canvas=20,
             vocab=512, eps=1e-5, softcap=20.0, theta=2e4, full_theta=3e5, rotary=0.5,
             old_keys=True, max_shard_size="12MB", seed=2),
        # Odd counts: 3 heads on 1 KV head, 5 experts, a prime vocabulary; full heads the smaller
        # ones; window much shorter than the canvas. Peaked predictions: canvases settle.
        Spec("odd", hidden=96, layers="sssf", heads=6, head_dim=32, kv_heads=2, full_head_dim=16,
             full_kv_heads=3, mlp=160, experts=5, top_k=4, expert_mlp=64, window=7, canvas=25,
             vocab=367, eps=1e-4, softcap=12.0, theta=500.0, full_theta=1e4, rotary=0.75,
             logit_gain=2.0, end_tokens=(EOS, TURN_END, 300, 301), seed=3),
        # No grouping at all in full layers, one expert of many; a file of bfloat16 weights.
        Spec("narrow", hidden=128, layers="fsssff", heads=2, head_dim=64, kv_heads=2,
             full_head_dim=96, full_kv_heads=2, mlp=224, experts=12, top_k=1, expert_mlp=96,
             window=40, canvas=10, vocab=403, softcap=50.0, theta=1e3, full_theta=1e5, rotary=1.0,
             post_norm=0.2, logit_gain=1.5, dtype=torch.bfloat16, seed=4),
        # All experts used, the widest heads, a long canvas, old keys, bfloat16.
        Spec("long", hidden=192, layers="sf", heads=4, head_dim=48, kv_heads=1, full_head_dim=128,
             full_kv_heads=4, mlp=64, experts=3, top_k=3, expert_mlp=128, window=64, canvas=64,
             vocab=700, eps=1e-3, rotary=0.125, logit_gain=1.5, dtype=torch.bfloat16,
             old_keys=True, seed=5),
    )
}  # fmt: skip

# The same without what multiplies an error: weak layers, and all experts at work, so that none is
# exchanged for another. Rounding to 8 bits then shows as what it is.
CALM = {
    f"calm {name}": dataclasses.replace(
        spec, name=f"calm {name}", post_norm=0.1, top_k=spec.experts
    )
    for name, spec in SPECS.items()
}


def text_config(spec: Spec) -> DiffusionGemmaTextConfig:
    """The reference's configuration of `spec`."""
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    values: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "global_head_dim": spec.full_head_dim,
        "num_global_key_value_heads": spec.full_kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": spec.eps,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": spec.theta},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": spec.full_theta,
                "partial_rotary_factor": spec.rotary,
            },
        },
        "sliding_window": spec.window,
        "layer_types": [kinds[kind] for kind in spec.layers],
        "final_logit_softcapping": spec.softcap,
        "num_experts": spec.experts,
        "top_k_experts": spec.top_k,
        "moe_intermediate_size": spec.expert_mlp,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return DiffusionGemmaTextConfig(**values)


def random_model(spec: Spec) -> DiffusionGemmaForBlockDiffusion:
    """The reference with random weights; float32, eager."""
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, patch_size=2, position_embedding_size=4,
    )  # fmt: skip
    implementations: dict[str, Any] = {
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    config = DiffusionGemmaConfig(
        text_config=text_config(spec).to_dict(),
        vision_config=vision.to_dict(),
        canvas_length=spec.canvas,
        image_token_id=spec.vocab - 1,
        **implementations,
    )
    torch.manual_seed(spec.seed)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, weight in sorted(model.state_dict().items()):
            if "encoder" not in name or name.endswith("layer_scalar"):
                weight.copy_(_draw(name, weight.shape, spec, generator).to(spec.dtype))
    return model


def _draw(name: str, shape: torch.Size, spec: Spec, generator: torch.Generator) -> torch.Tensor:
    """A weight of the reference's `name`, scaled so that the network stays well-conditioned."""
    around_one = torch.rand(shape, generator=generator) + 0.5
    normal = torch.randn(shape, generator=generator)
    if name.endswith("layer_scalar"):
        return 0.5 * around_one + 0.4
    if name.endswith(("router.scale", "per_expert_scale")):
        return around_one
    if "router.proj" in name:
        return 2.0 * normal
    if "embed_tokens" in name or "lm_head" in name:
        return normal * spec.hidden**-0.5
    if "q_norm" in name or "k_norm" in name:
        # q·k is used unscaled: this gives attention scores a standard deviation near 2
        return around_one * math.sqrt(2.0) * shape[0] ** -0.25
    if "post_attention" in name or "post_feedforward_layernorm.weight" in name:
        return around_one * spec.post_norm
    if name == "model.decoder.norm.weight":
        return around_one * spec.logit_gain
    if len(shape) == 1:
        return around_one
    return normal * shape[-1] ** -0.5


def make_checkpoint(folder: Path, spec: Spec) -> Path:
    """Writes a checkpoint of `spec` with tokenizer and generation defaults; returns `folder`."""
    model = random_model(spec)
    torch.nn.Module.to(model, spec.dtype)
    model.save_pretrained(folder, max_shard_size=spec.max_shard_size)
    _rewrite(folder / "config.json", lambda config: _configure(config, spec))
    (folder / "generation_config.json").write_text(
        json.dumps(
            {
                "max_denoising_steps": 8,
                "t_min": 0.35,
                "t_max": 0.75,
                "stability_threshold": 1,
                "confidence_threshold": 0.01,
                "sampler_config": {
                    "_cls_name": "EntropyBoundSamplerConfig",
                    "entropy_bound": 0.2,
                },
                "bos_token_id": BOS,
                "eos_token_id": list(spec.end_tokens),
                "pad_token_id": PAD,
            }
        )
    )
    write_tokenizer(folder, spec.vocab)
    return folder


def _rewrite(path: Path, change: Any) -> None:
    """Applies `change` to the JSON object in `path`."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2))


def _configure(config: dict[str, Any], spec: Spec) -> None:
    """Brings a saved config into the form of the released one, or of an older checkpoint."""
    config["eos_token_id"] = list(spec.end_tokens)
    text = config["text_config"]
    if spec.old_keys:
        del text["per_layer_config"]
        text["attention_k_eq_v"] = True
        text["global_head_dim"] = spec.full_head_dim
        text["num_global_key_value_heads"] = spec.full_kv_heads
    else:
        assert "per_layer_config" in text
        assert "global_head_dim" not in text


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A BPE tokenizer of the real kind: byte fallback, `▁` for a space, turn tokens."""
    letters = "▁etaoinshrdlucmfwypvbgkqjxz"
    tokens = [*SPECIAL, *TURNS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for left in letters:
        for right in string.ascii_lowercase:
            if len(tokens) < vocab_size - 2:
                merges.append((left, right))
                tokens.append(left + right)
    # The last ids have no text, as in the released vocabulary.
    tokens += [f"<unused{i}>" for i in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in [*SPECIAL, *TURNS]])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "GemmaTokenizer",
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "mask_token": "<mask>",
                "add_bos_token": True,
            }
        )
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
