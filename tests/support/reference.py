"""The judge: `transformers`' own DiffusionGemma, run in float32 with eager attention."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

F32 = NDArray[np.float32]

# GGUF name without `.weight` → name in the checkpoint, for tensors outside and inside the layers.
GLOBAL_NAMES = {
    "token_embd": "model.decoder.embed_tokens.weight",
    "output_norm": "model.decoder.norm.weight",
    "self_cond_pre_norm": "model.decoder.self_conditioning.pre_norm.weight",
    "self_cond_gate": "model.decoder.self_conditioning.gate_proj.weight",
    "self_cond_up": "model.decoder.self_conditioning.up_proj.weight",
    "self_cond_down": "model.decoder.self_conditioning.down_proj.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "attn_q": "self_attn.q_proj.weight",
    "attn_k": "self_attn.k_proj.weight",
    "attn_v": "self_attn.v_proj.weight",
    "attn_output": "self_attn.o_proj.weight",
    "attn_q_norm": "self_attn.q_norm.weight",
    "attn_k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffw_norm": "post_feedforward_layernorm.weight",
    "post_ffw_norm_1": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2": "post_feedforward_layernorm_2.weight",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2.weight",
    "ffn_gate": "mlp.gate_proj.weight",
    "ffn_up": "mlp.up_proj.weight",
    "ffn_down": "mlp.down_proj.weight",
    "ffn_gate_inp": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps": "experts.gate_up_proj",
    "ffn_down_exps": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "layer_output_scale": "layer_scalar",
}


class Reference:
    """One conversation with the reference: what `dgemma`'s session is compared with."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        self.model = model.float().eval()
        self.reset()

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """The checkpoint in `folder`, its weights widened to float32."""
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        return cls(model)

    @property
    def canvas_length(self) -> int:
        return int(self.model.config.canvas_length)

    @property
    def n_vocab(self) -> int:
        return int(self.model.config.text_config.vocab_size)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> None:
        """Encodes `tokens` behind the cache."""
        self.model.model.encoder(input_ids=torch.tensor([list(tokens)]), past_key_values=self.cache)

    @torch.no_grad()
    def canvas_logits(
        self, canvas: Sequence[int], self_conditioning_logits: F32 | None = None
    ) -> F32:
        """Soft-capped logits (canvas, vocab) of one decoder pass."""
        previous = self_conditioning_logits
        output = self.model(
            decoder_input_ids=torch.tensor([list(canvas)]),
            past_key_values=self.cache,
            self_conditioning_logits=None if previous is None else torch.from_numpy(previous)[None],
        )
        return output.logits[0].numpy()


@dataclasses.dataclass
class Recording:
    """One run of the reference's `generate`, with every draw it made; lists are per canvas."""

    tokens: list[int]  # new tokens up to and including the first end token, else whole canvases
    ended: bool  # by an end token
    initial: list[NDArray[np.int32]] = dataclasses.field(default_factory=list)
    candidates: list[list[NDArray[np.int32]]] = dataclasses.field(default_factory=list)
    renoise: list[list[NDArray[np.int32]]] = dataclasses.field(default_factory=list)
    drafts: list[list[NDArray[np.int32]]] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """Denoising steps of each canvas."""
        return [len(drafts) for drafts in self.drafts]


def record_generate(
    reference: Reference, prompt: Sequence[int], seed: int, **options: Any
) -> Recording:
    """Runs the reference's `generate` on `prompt` and writes down its draws.

    `options` are its own: max_new_tokens, max_denoising_steps, t_min, t_max, entropy_bound,
    stability_threshold, confidence_threshold, eos_token_id.
    """
    recording = Recording([], False)
    initialize, renoise = EntropyBoundSampler.initialize_canvas, EntropyBoundSampler.renoise_canvas
    multinomial = torch.multinomial
    renoising = False

    def record_canvas(
        self: EntropyBoundSampler, batch_size: int, device: torch.device
    ) -> torch.Tensor:
        tokens = initialize(self, batch_size, device)
        if renoising:
            recording.renoise[-1].append(_ids(tokens))
        else:
            recording.initial.append(_ids(tokens))
            for per_step in (recording.candidates, recording.renoise, recording.drafts):
                per_step.append([])
        return tokens

    def record_renoise(self: EntropyBoundSampler, *args: Any) -> torch.Tensor:
        nonlocal renoising
        renoising = True
        tokens = renoise(self, *args)
        renoising = False
        return tokens

    def record_candidates(*args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = multinomial(*args, **kwargs)
        recording.candidates[-1].append(_ids(tokens))
        return tokens

    class Drafts:
        """The streamer through which the reference shows each step's argmax."""

        def put(self, value: torch.Tensor) -> None: ...

        def put_draft(self, value: torch.Tensor) -> None:
            recording.drafts[-1].append(_ids(value))

        def end(self) -> None: ...

    if "entropy_bound" in options:
        bound = options.pop("entropy_bound")
        options["sampler_config"] = EntropyBoundSamplerConfig(entropy_bound=bound)
    torch.manual_seed(seed)
    with (
        mock.patch.object(EntropyBoundSampler, "initialize_canvas", record_canvas),
        mock.patch.object(EntropyBoundSampler, "renoise_canvas", record_renoise),
        mock.patch.object(torch, "multinomial", record_candidates),
    ):
        output = reference.model.generate(
            torch.tensor([list(prompt)]), streamer=Drafts(), **options
        )
    ends = options.get("eos_token_id", reference.model.generation_config.eos_token_id)
    tokens = output.sequences[0, len(prompt) :].tolist()
    first_end = next((i for i, token in enumerate(tokens) if token in ends), None)
    recording.ended = first_end is not None
    recording.tokens = tokens if first_end is None else tokens[: first_end + 1]
    return recording


def _ids(tokens: torch.Tensor) -> NDArray[np.int32]:
    return tokens.flatten().numpy().astype(np.int32)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, F32]]:
    """Keys and decoded tensors of a GGUF file, as the public `gguf` package reads them.

    NVFP4 multipliers (`.scale` beside the weight) are applied; the router's two `.scale` tensors,
    which are weights of their own, are not.
    """
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = values.reshape(shape).astype(np.float32)
    for name in list(tensors):
        weight = name.removesuffix(".scale") + ".weight"
        router = name.endswith(("ffn_gate_inp.scale", "ffn_down_exps.scale"))
        if name.endswith(".scale") and not router:
            scale = tensors.pop(name)
            tensors[weight] = tensors[weight] * scale.reshape(-1, *[1] * (tensors[weight].ndim - 1))
    return keys, tensors


def checkpoint_tensors(tensors: Mapping[str, F32]) -> dict[str, torch.Tensor]:
    """Decoded GGUF tensors under the checkpoint's names; separate gate and up experts are fused."""
    tensors = dict(tensors)
    for name in [n for n in tensors if n.endswith("ffn_gate_exps.weight")]:
        gate, up = tensors.pop(name), tensors.pop(name.replace("gate", "up"))
        fused = name.replace("ffn_gate_exps", "ffn_gate_up_exps")
        tensors[fused] = np.concatenate([gate, up], axis=1)
    tensors.pop("rope_freqs.weight")
    state = {}
    for name, value in tensors.items():
        base = name.removesuffix(".weight")
        if layer := re.fullmatch(r"blk\.(\d+)\.(.+)", base):
            number, own = layer.groups()
            if own == "enc_layer_output_scale":
                target = f"model.encoder.language_model.layers.{number}.layer_scalar"
            else:
                target = f"model.decoder.layers.{number}.{LAYER_NAMES[own]}"
        else:
            target = GLOBAL_NAMES[base]
        state[target] = torch.from_numpy(np.ascontiguousarray(value))
    return state


def load_gguf_as_reference(path: Path, checkpoint: Path) -> Reference:
    """The reference with the weights of a GGUF file, decoded by the `gguf` package.

    `checkpoint` is the folder that the file was made from; only its configuration is used.
    """
    config = DiffusionGemmaConfig.from_dict(json.loads((checkpoint / "config.json").read_text()))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = DiffusionGemmaForBlockDiffusion(config)
    state = checkpoint_tensors(read_gguf(path)[1])
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert not unexpected
    # What the file leaves out: the images' part, and names that are tied to others.
    decoder = [n for n in missing if n.startswith("model.decoder") or n.endswith("layer_scalar")]
    assert not decoder, decoder
    return Reference(model)


def relative_rms(actual: F32, expected: F32) -> float:
    """Root-mean-square error over the root-mean-square of what is expected."""
    difference = actual.astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / (expected.astype(np.float64) ** 2).mean()))
