"""The training forward of the tiny DiffusionGemma: the reference's maths, made for speed.

Against transformers' modules it saves the loop over experts, the chains of eager norms and the
part of the encoder that nothing reads; `train_tiny.py` checks that the logits are the same.
Parameters carry the checkpoint's names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SLIDING, FULL = "sliding_attention", "full_attention"
Cached = tuple[Tensor, Tensor]


class Spread(torch.autograd.Function):
    """Copies of rows in expert order; its gradient is a gather, which beats a scatter on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slots: Tensor) -> Tensor:
        """`x` (n, d) -> (len(source), d); row `slots[i]` of the result belongs to pair i."""
        ctx.save_for_backward(slots)
        ctx.n = len(x)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Sum the gradients of a row's copies."""
        (slots,) = ctx.saved_tensors
        grad = grads[0].index_select(0, slots)
        return grad.view(ctx.n, -1, grad.shape[-1]).sum(1), None, None


class Collect(torch.autograd.Function):
    """Rows picked out of a padded buffer, each at most once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        """`x` (m, d) -> (len(slots), d)."""
        ctx.save_for_backward(slots)
        ctx.m = len(x)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Put gradients back; rows that nobody picked get zero."""
        (slots,) = ctx.saved_tensors
        grad = grads[0].new_zeros(ctx.m, grads[0].shape[-1])
        return grad.index_copy_(0, slots, grads[0]), None


def _rms(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm in float32, the weight used as stored; the result in `dtype`."""
    return functional.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(dtype)


def _add_rms(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Residual sum `x + rms(y)`."""
    return x + functional.rms_norm(y.float(), (y.shape[-1],), weight, eps)


def _rms_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm per head, then rotation of (batch, length, heads, head_dim) by (length, 1, head_dim)."""
    y = functional.rms_norm(x.float(), (x.shape[-1],), weight, eps)
    left, right = y.chunk(2, -1)
    return (y * cos + torch.cat((-right, left), -1) * sin).to(x.dtype)


# Eager norms are chains of passes over memory: compiled, forward and backward take a twentieth of
# the time, and a whole training step half.
torch._dynamo.config.recompile_limit = 64
rms = torch.compile(_rms, dynamic=True)
add_rms = torch.compile(_add_rms, dynamic=True)
rms_rope = torch.compile(_rms_rope, dynamic=True)


class TinyModel(nn.Module):
    """Weights and training forward of one configuration (the `text_config` of the reference)."""

    def __init__(self, config: Any, canvas_length: int) -> None:
        """Initialise for fast training: residual branches at half strength, unit-variance inputs.

        `config` is a `DiffusionGemmaTextConfig`; seed torch beforehand for a reproducible start.
        """
        super().__init__()
        self.config, self.canvas_length = config, canvas_length
        self.dtype = torch.float32
        self.quantize: Any = None
        self.names: dict[str, str] = {}
        hidden, width = config.hidden_size, config.intermediate_size
        experts, narrow = config.num_experts, config.moe_intermediate_size
        self._new("decoder.embed_tokens.weight", torch.randn(config.vocab_size, hidden), hidden)
        self._new("decoder.norm.weight", torch.ones(hidden))
        self._new("decoder.self_conditioning.pre_norm.weight", torch.ones(hidden))
        self._mlp("decoder.self_conditioning", hidden, width)
        self.head_dims, self.kv_heads = [], []
        for i, kind in enumerate(config.layer_types):
            own = config.per_layer_config[i]
            head_dim, kv_heads = own.head_dim, own.num_key_value_heads
            self.head_dims.append(head_dim)
            self.kv_heads.append(kv_heads)
            pre = f"decoder.layers.{i}."
            heads = config.num_attention_heads
            self._matrix(pre + "self_attn.q_proj.weight", heads * head_dim, hidden)
            self._matrix(pre + "self_attn.k_proj.weight", kv_heads * head_dim, hidden)
            if kind == SLIDING:
                self._matrix(pre + "self_attn.v_proj.weight", kv_heads * head_dim, hidden)
            self._matrix(pre + "self_attn.o_proj.weight", hidden, heads * head_dim)
            # q·k is used unscaled: start it with a standard deviation near 2
            for name in ("q_norm", "k_norm"):
                start = (2.0 / head_dim**0.5) ** 0.5
                self._new(f"{pre}self_attn.{name}.weight", torch.full((head_dim,), start))
            self._mlp(pre + "mlp", hidden, width)
            self._matrix(pre + "experts.gate_up_proj", 2 * narrow, hidden, experts)
            self._matrix(pre + "experts.down_proj", hidden, narrow, experts)
            self._new(pre + "router.proj.weight", 2.0 * torch.randn(experts, hidden))
            self._new(pre + "router.scale", torch.ones(hidden))
            self._new(pre + "router.per_expert_scale", torch.ones(experts))
            for name, start in (
                ("input_layernorm", 1.0),
                ("post_attention_layernorm", 0.5),
                ("pre_feedforward_layernorm", 1.0),
                ("pre_feedforward_layernorm_2", 1.0),
                ("post_feedforward_layernorm_1", 0.7),
                ("post_feedforward_layernorm_2", 0.7),
                ("post_feedforward_layernorm", 0.5),
            ):
                self._new(f"{pre}{name}.weight", torch.full((hidden,), start))
            self._new(pre + "layer_scalar", torch.ones(1))
            self._new(f"encoder.language_model.layers.{i}.layer_scalar", torch.ones(1))

    def _new(self, name: str, value: Tensor, fan_in: int = 1) -> None:
        self.names[name] = name.replace(".", "_")
        self.register_parameter(self.names[name], nn.Parameter(value * fan_in**-0.5))

    def _matrix(self, name: str, rows: int, columns: int, experts: int = 0) -> None:
        shape = (experts, rows, columns) if experts else (rows, columns)
        self._new(name, torch.randn(shape), columns)

    def _mlp(self, name: str, hidden: int, width: int) -> None:
        self._matrix(name + ".gate_proj.weight", width, hidden)
        self._matrix(name + ".up_proj.weight", width, hidden)
        self._matrix(name + ".down_proj.weight", hidden, width)

    def checkpoint(self) -> dict[str, Tensor]:
        """The weights under the reference's names."""
        return {f"model.{k}": getattr(self, v).detach() for k, v in self.names.items()}

    def matrices(self) -> list[str]:
        """Names of what Muon trains and 4-bit files quantize, the embedding aside."""
        return [n for n in self.names if "_proj" in n]

    def prepare(self) -> None:
        """Cast (and fake-quantize) the matrices once for all the passes of a training step."""
        self.ready: dict[str, Tensor] = {}
        self.balance = torch.zeros(())
        for name, attribute in self.names.items():
            value = getattr(self, attribute)
            if "_proj" in name or "embed" in name:
                if self.quantize is not None:
                    # straight through: rounded forward, gradient of the unrounded
                    value = value + (self.quantize(value.detach()) - value.detach())
                value = value.to(self.dtype)
            self.ready[name] = value

    def linear(self, x: Tensor, name: str) -> Tensor:
        """`x` (…, columns) times a matrix, in the training precision."""
        return functional.linear(x.to(self.dtype), self.ready[name])

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """Gated MLP with the tanh form of GELU."""
        gate = functional.gelu(self.linear(x, name + ".gate_proj.weight"), approximate="tanh")
        up = self.linear(x, name + ".up_proj.weight")
        return self.linear(gate * up, name + ".down_proj.weight")

    def moe(self, x: Tensor, pre: str) -> Tensor:
        """Experts over `x` (n, hidden): tokens sorted by expert, one product per expert."""
        w, config = self.ready, self.config
        eps, top_k = config.rms_norm_eps, config.top_k_experts
        scored = rms(x, None, eps, torch.float32) * (
            w[pre + "router.scale"] * config.hidden_size**-0.5
        )
        p = functional.linear(scored, w[pre + "router.proj.weight"]).softmax(-1)
        weights, chosen = p.topk(top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * w[pre + "router.per_expert_scale"][chosen]
        flat = chosen.flatten()
        load = torch.bincount(flat, minlength=config.num_experts)
        if torch.is_grad_enabled():
            share = load / flat.numel()
            self.balance = self.balance + config.num_experts * (share * p.mean(0)).sum()
        # Each expert's rows are padded to a multiple of 128: a matrix product of a new size costs
        # the compilation of a new kernel.
        room = (load + 127) // 128 * 128
        order = flat.argsort(stable=True)
        shift = (room.cumsum(0) - room) - (load.cumsum(0) - load)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order)) + shift[flat[order]]
        source = torch.zeros(int(room.sum()), dtype=torch.long)
        source[slots] = torch.arange(len(flat)) // top_k
        h = rms(x, w[pre + "pre_feedforward_layernorm_2.weight"], eps, self.dtype)
        grouped = Spread.apply(h, source, slots).split(room.tolist())
        done = []
        for e, tokens in enumerate(grouped):
            gate, up = functional.linear(tokens, w[pre + "experts.gate_up_proj"][e]).chunk(2, -1)
            inner = functional.gelu(gate, approximate="tanh") * up
            done.append(functional.linear(inner, w[pre + "experts.down_proj"][e]))
        y = Collect.apply(torch.cat(done), slots)
        return (y.view(-1, top_k, y.shape[-1]).float() * weights[..., None]).sum(1)

    def rope(self, kind: str, first: int, n: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, 1, head_dim) of the positions from `first`."""
        given = self.config.rope_parameters[kind]
        i = torch.arange(head_dim // 2)
        frequency = given["rope_theta"] ** (-2.0 * i / head_dim)
        if kind == FULL:
            rotated = given["partial_rotary_factor"] * head_dim / 2
            frequency = torch.where(i < rotated, frequency, 0.0)
        angle = torch.arange(first, first + n)[:, None] * frequency
        angle = torch.cat((angle, angle), -1)[:, None]
        return angle.cos(), angle.sin()

    def layer(
        self, i: int, x: Tensor, first: int, mask: Tensor, scalar: Tensor, cache: Cached | None
    ) -> tuple[Tensor, Cached]:
        """One layer over `x` (batch, n, hidden), whose positions begin at `first`.

        `mask` (batch, 1, n or 1, keys) is added to the scores; `cache` holds the keys and values
        that stand before those of `x`. Returns the new `x` and the keys and values of `x` alone.
        """
        w, config, eps = self.ready, self.config, self.config.rms_norm_eps
        pre = f"decoder.layers.{i}."
        batch, n = x.shape[:2]
        head_dim, kv_heads = self.head_dims[i], self.kv_heads[i]
        h = rms(x, w[pre + "input_layernorm.weight"], eps, self.dtype)
        k, v = self.keys_values(i, h, first)
        cos, sin = self.rope(config.layer_types[i], first, n, head_dim)
        q = self.linear(h, pre + "self_attn.q_proj.weight").view(batch, n, -1, head_dim)
        q = rms_rope(q, w[pre + "self_attn.q_norm.weight"], eps, cos, sin)
        keys = k if cache is None else torch.cat((cache[0], k), 2)
        values = v if cache is None else torch.cat((cache[1], v), 2)
        # the queries that share a key head stand below each other
        q = q.transpose(1, 2).reshape(batch, kv_heads, -1, head_dim)
        scores = (q @ keys.mT).view(batch, -1, n, keys.shape[2])
        a = (scores + mask).softmax(-1).view(batch, kv_heads, -1, keys.shape[2])
        a = (a @ values).view(batch, -1, n, head_dim).transpose(1, 2).reshape(batch, n, -1)
        a = self.linear(a, pre + "self_attn.o_proj.weight")
        x = add_rms(x, a, w[pre + "post_attention_layernorm.weight"], eps)

        h = rms(x, w[pre + "pre_feedforward_layernorm.weight"], eps, self.dtype)
        dense = self.mlp(h, pre + "mlp")
        dense = rms(dense, w[pre + "post_feedforward_layernorm_1.weight"], eps, torch.float32)
        sparse = self.moe(x.reshape(-1, x.shape[-1]), pre).view(x.shape)
        both = add_rms(dense, sparse, w[pre + "post_feedforward_layernorm_2.weight"], eps)
        x = add_rms(x, both, w[pre + "post_feedforward_layernorm.weight"], eps)
        return x * scalar, (k, v)

    def keys_values(self, i: int, h: Tensor, first: int) -> Cached:
        """Keys and values (batch, KV heads, n, head_dim) of normed input `h` (batch, n, hidden)."""
        w, eps, pre = self.ready, self.config.rms_norm_eps, f"decoder.layers.{i}.self_attn."
        kind, head_dim = self.config.layer_types[i], self.head_dims[i]
        k = self.linear(h, pre + "k_proj.weight")
        v = self.linear(h, pre + "v_proj.weight") if kind == SLIDING else k
        k, v = (t.view(*h.shape[:2], -1, head_dim) for t in (k, v))
        cos, sin = self.rope(kind, first, h.shape[1], head_dim)
        k = rms_rope(k, w[pre + "k_norm.weight"], eps, cos, sin)
        return k.transpose(1, 2), rms(v, None, eps, self.dtype).transpose(1, 2)

    def encode(self, tokens: Tensor, starts: Tensor) -> list[Cached]:
        """Keys and values of every layer for `tokens` (batch, n), causally.

        Rows are padded on the left; `starts` (batch) is the index of the first real token.
        """
        n, window = tokens.shape[1], self.config.sliding_window
        x = functional.embedding(tokens, self.ready["decoder.embed_tokens.weight"]).float()
        x = x * self.config.hidden_size**0.5
        q_at, k_at = torch.arange(n)[:, None], torch.arange(n)
        # a padded row must see something, or its softmax is not a number
        seen = (k_at <= q_at) & ((k_at >= starts[:, None, None, None]) | (k_at == q_at))
        masks = {FULL: self.mask(seen), SLIDING: self.mask(seen & (q_at - k_at < window))}
        caches = []
        last = len(self.head_dims) - 1
        for i in range(last):
            scalar = self.ready[f"encoder.language_model.layers.{i}.layer_scalar"]
            x, cache = self.layer(i, x, 0, masks[self.config.layer_types[i]], scalar, None)
            caches.append(cache)
        # of the last layer, the decoder reads only keys and values
        norm = self.ready[f"decoder.layers.{last}.input_layernorm.weight"]
        h = rms(x, norm, self.config.rms_norm_eps, self.dtype)
        return [*caches, self.keys_values(last, h, 0)]

    def decode(
        self, canvas: Tensor, caches: list[Cached], starts: Tensor, draft: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, n, vocab) for a noisy `canvas` (batch, n) behind an encoded prompt.

        `draft` (batch, n, vocab) holds the temperature-scaled logits of an earlier pass.
        """
        config, w, eps = self.config, self.ready, self.config.rms_norm_eps
        table = w["decoder.embed_tokens.weight"]
        root = config.hidden_size**0.5
        x = functional.embedding(canvas, table).float() * root
        if draft is not None:
            soft = (draft.softmax(-1).to(self.dtype) @ table).float() * root
            soft = rms(soft, w["decoder.self_conditioning.pre_norm.weight"], eps, self.dtype)
            x = x + self.mlp(soft, "decoder.self_conditioning")
        x = rms(x, None, eps, torch.float32)
        n_past = caches[0][0].shape[2]
        k_at = torch.arange(n_past + canvas.shape[1])
        real = k_at >= starts[:, None, None, None]
        # the whole canvas looks equally far back: from its first position
        near = k_at > n_past - config.sliding_window
        masks = {FULL: self.mask(real), SLIDING: self.mask(real & near)}
        for i, kind in enumerate(config.layer_types):
            scalar = w[f"decoder.layers.{i}.layer_scalar"]
            x, _ = self.layer(i, x, n_past, masks[kind], scalar, caches[i])
        x = rms(x, w["decoder.norm.weight"], eps, self.dtype)
        cap = config.final_logit_softcapping
        return cap * torch.tanh(self.linear(x, "decoder.embed_tokens.weight").float() / cap)

    def mask(self, seen: Tensor) -> Tensor:
        """Zero where `seen`, else a number that no score outweighs."""
        return torch.where(seen, 0.0, -1e9).to(self.dtype)
