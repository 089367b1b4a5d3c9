"""docs/model.md as NumPy in float64: slow, short, and independent of both implementations.

It reads what a GGUF file holds (keys and decoded tensors, see `reference.read_gguf`), so it also
says what every key and tensor of the file means. Arrays are (tokens, …).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def gelu(x: F64) -> F64:
    """The tanh form of GELU."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: F64) -> F64:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class NumpyModel:
    """One conversation with the model; keys and values of all tokens are kept."""

    def __init__(self, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        self.canvas_length = int(keys["diffusion.canvas_length"])

        def own(name: str) -> Any:
            return keys["diffusion-gemma." + name]

        self.n_layers = own("block_count")
        self.sliding = own("attention.sliding_window_pattern")
        self.window = own("attention.sliding_window")
        self.heads = own("attention.head_count")
        self.kv_heads = own("attention.head_count_kv")
        self.head_dim = [
            own("attention.key_length_swa" if sliding else "attention.key_length")
            for sliding in self.sliding
        ]
        self.theta = [
            own("rope.freq_base_swa" if sliding else "rope.freq_base") for sliding in self.sliding
        ]
        self.eps = own("attention.layer_norm_rms_epsilon")
        self.top_k = own("expert_used_count")
        self.softcap = own("final_logit_softcapping")
        self.embedding = self.w["token_embd.weight"]
        self.root = self.embedding.shape[1] ** 0.5
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        self.cache: list[tuple[F64, F64]] = [
            (np.zeros((0, n, d)), np.zeros((0, n, d)))
            for n, d in zip(self.kv_heads, self.head_dim, strict=True)
        ]

    @property
    def n_past(self) -> int:
        return len(self.cache[0][0])

    def rms(self, x: F64, name: str | None = None) -> F64:
        """Normalises the last axis; multiplies by the weight `name`, if there is one."""
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps)
        return y if name is None else y * self.w[name + ".weight"]

    def meets(self, name: str, x: F64, matrix: int = 0) -> None:
        """Called before rows `x` meet a weight, or one expert's matrix of it."""

    def linear(self, x: F64, name: str) -> F64:
        self.meets(name, x)
        return x @ self.w[name + ".weight"].T

    def rope(self, x: F64, layer: int) -> F64:
        """Rotates pairs (i, i + head_dim/2) of `x` (tokens, heads, head_dim) at n_past, …"""
        half = x.shape[-1] // 2
        frequency = self.theta[layer] ** (-np.arange(half) / half)
        if not self.sliding[layer]:
            frequency = frequency / self.w["rope_freqs.weight"]
        angle = (self.n_past + np.arange(len(x)))[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, x: F64, layer: int, encoding: bool) -> F64:
        """Attends from `x` to the cache and to `x`; an encoder's keys and values are kept."""
        b = f"blk.{layer}."
        h = self.rms(x, b + "attn_norm")
        q = self.linear(h, b + "attn_q").reshape(len(x), -1, self.head_dim[layer])
        k: F64 = self.linear(h, b + "attn_k").reshape(len(x), -1, self.head_dim[layer])
        v: F64 = k
        if self.sliding[layer]:
            v = self.linear(h, b + "attn_v").reshape(k.shape)
        q = self.rope(self.rms(q, b + "attn_q_norm"), layer)
        k = self.rope(self.rms(k, b + "attn_k_norm"), layer)
        past_k, past_v = self.cache[layer]
        k = np.concatenate([past_k, k])
        v = np.concatenate([past_v, self.rms(v)])
        if encoding:
            self.new_cache.append((k, v))

        query, key = np.arange(len(past_k), len(k))[:, None], np.arange(len(k))[None]
        if encoding:
            seen = key <= query
            if self.sliding[layer]:
                seen &= query - key < self.window
        elif self.sliding[layer]:
            # the same keys for the whole canvas: its own, and the last window - 1 of the cache
            seen = np.broadcast_to(key > len(past_k) - self.window, (len(x), len(k)))
        else:
            seen = np.ones((len(x), len(k)), bool)

        group = self.heads // self.kv_heads[layer]
        scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, axis=1))
        p = softmax(np.where(seen, scores, -np.inf))
        a = np.einsum("hqk,khd->qhd", p, np.repeat(v, group, axis=1)).reshape(len(x), -1)
        return self.rms(self.linear(a, b + "attn_output"), b + "post_attention_norm")

    def mlp(self, x: F64, prefix: str) -> F64:
        gate, up = self.linear(x, prefix + "gate"), self.linear(x, prefix + "up")
        return self.linear(gelu(gate) * up, prefix + "down")

    def moe(self, x: F64, layer: int) -> F64:
        b = f"blk.{layer}."
        scored = self.rms(x) * self.w[b + "ffn_gate_inp.scale"] / self.root
        p = softmax(self.linear(scored, b + "ffn_gate_inp"))
        h = self.rms(x, b + "pre_ffw_norm_2")
        if b + "ffn_gate_up_exps.weight" in self.w:
            gate, up = np.split(self.w[b + "ffn_gate_up_exps.weight"], 2, axis=1)
        else:
            gate, up = (self.w[b + f"ffn_{kind}_exps.weight"] for kind in ("gate", "up"))
        down, scale = self.w[b + "ffn_down_exps.weight"], self.w[b + "ffn_down_exps.scale"]
        y = np.zeros_like(x)
        for token in range(len(x)):
            chosen = np.argsort(-p[token], kind="stable")[: self.top_k]
            share = p[token, chosen] / p[token, chosen].sum()
            for e, weight in zip(chosen, share * scale[chosen], strict=True):
                self.meets(b + "ffn_gate_up_exps", h[token : token + 1], e)
                inner = gelu(gate[e] @ h[token]) * (up[e] @ h[token])
                self.meets(b + "ffn_down_exps", inner[None], e)
                y[token] += weight * (down[e] @ inner)
        return y

    def layers(self, x: F64, encoding: bool) -> F64:
        """All layers, over a chunk of the prompt or over a canvas."""
        self.new_cache: list[tuple[F64, F64]] = []
        scalar = "enc_layer_output_scale" if encoding else "layer_output_scale"
        for i in range(self.n_layers):
            b = f"blk.{i}."
            x = x + self.attention(x, i, encoding)
            dense = self.mlp(self.rms(x, b + "ffn_norm"), b + "ffn_")
            experts = self.rms(self.moe(x, i), b + "post_ffw_norm_2")
            both = self.rms(dense, b + "post_ffw_norm_1") + experts
            x = x + self.rms(both, b + "post_ffw_norm")
            x = x * self.w[f"{b}{scalar}.weight"]
        if encoding:
            self.cache = self.new_cache
        return x

    def prefill(self, tokens: Sequence[int]) -> None:
        """Encodes `tokens` behind the cache."""
        self.layers(self.embedding[np.asarray(tokens)] * self.root, encoding=True)

    def canvas_logits(
        self, canvas: Sequence[int], self_conditioning_logits: NDArray[Any] | None = None
    ) -> F64:
        """Soft-capped logits (canvas, vocab) of one decoder pass."""
        x = self.embedding[np.asarray(canvas)] * self.root
        if self_conditioning_logits is not None:
            p = softmax(np.asarray(self_conditioning_logits, np.float64))
            soft = p @ self.embedding * self.root
            x = x + self.mlp(self.rms(soft, "self_cond_pre_norm"), "self_cond_")
        x = self.layers(self.rms(x), encoding=False)
        logits = self.linear(self.rms(x, "output_norm"), "token_embd")
        return self.softcap * np.tanh(logits / self.softcap)
