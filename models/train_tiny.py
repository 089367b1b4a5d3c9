"""Train `models/tiny`, a DiffusionGemma of a few million weights that really answers.

    python models/train_tiny.py --out models/tiny

Needs torch, transformers (>= 5.11), tokenizers, safetensors and tqdm; runs on two CPU cores.
The objective is uniform-noise denoising: every canvas token is replaced by a random one with
probability t, and the model restores the clean canvas. Weights are written in the layout of the
released checkpoint and load in `transformers` as they are.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiny_data as data
import torch
from safetensors.torch import save_file
from tiny_model import TinyModel
from tiny_tokenizer import build_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

HERE = Path(__file__).parent
VOCAB_SIZE, CANVAS, WINDOW = 750, 32, 64
LAYERS = ["sliding_attention", "full_attention"] * 2


def make_config() -> DiffusionGemmaConfig:
    """Sizes that differ from the released model's in every respect.

    Row lengths are multiples of 256 (hidden, `o_proj` of full layers), of 64 only (MLP) and of 32
    only (experts), so that each quantization type meets rows that it can and cannot take.
    """
    wide = {"head_dim": 64, "num_key_value_heads": 1}
    full = {i: wide for i, kind in enumerate(LAYERS) if kind == "full_attention"}
    text = DiffusionGemmaTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        sliding_window=WINDOW,
        layer_types=LAYERS,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=96,
        per_layer_config=full,
    )
    # The class insists on a vision tower; this one is as small as it gets and its weights are
    # left out of the file.
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        position_embedding_size=32,
    )
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
        # `generate` compares tokens with this one: an id that no text contains
        image_token_id=VOCAB_SIZE,
        boi_token_id=VOCAB_SIZE + 1,
        eoi_token_id=VOCAB_SIZE + 2,
    )


def export(weights: dict[str, Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Write a folder that `from_pretrained` loads: configuration, bfloat16 weights, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    config = make_config()
    config.architectures = ["DiffusionGemmaForBlockDiffusion"]
    config.dtype = "bfloat16"
    config.save_pretrained(out)
    DiffusionGemmaGenerationConfig(
        max_new_tokens=256,
        max_denoising_steps=48,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        bos_token_id=data.BOS,
        pad_token_id=data.PAD,
        eos_token_id=[data.EOS, data.END_OF_TURN, data.TOOL_RESPONSE],
    ).save_pretrained(out)
    stored = {k: v.to(torch.bfloat16).contiguous() for k, v in weights.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = (HERE.parent / "python" / "dgemma" / "gemma4.jinja").read_text()
    fast.save_pretrained(out)


@dataclass
class Batch:
    """`prompt` (batch, longest) padded on the left from `starts`; `clean` (batch, canvas)."""

    prompt: Tensor
    starts: Tensor
    clean: Tensor


def samples(tokenizer: Tokenizer, rng: random.Random) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (context, canvas) pairs: one canvas of a dialogue or story, the rest before it."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    while True:
        if rng.random() < 0.06:
            ids = [data.BOS, *encode(data.story(rng)), data.EOS]
            # cut anywhere, since a prompt may end anywhere
            cut = rng.randint(2, len(ids) - 2)
            prompt, target = ids[:cut], ids[cut:]
        else:
            dialogue = data.dialogue(rng)
            prompt, target = encode(data.render(dialogue)), encode(dialogue.target)
        at = rng.randrange(0, len(target), CANVAS)
        canvas = target[at : at + CANVAS]
        yield prompt + target[:at], canvas + [data.PAD] * (CANVAS - len(canvas))


def batches(tokenizer: Tokenizer, seed: int, budget: int) -> Iterator[Batch]:
    """Endless batches of about `budget` tokens, of samples with nearly equal prompt lengths."""
    rng = random.Random(seed)
    stream = samples(tokenizer, rng)
    while True:
        pool = sorted((next(stream) for _ in range(1600)), key=lambda s: len(s[0]))
        groups = []
        while pool:
            # few different shapes: each new one costs the compilation of new kernels
            longest = (len(pool[-1][0]) + 7) // 8 * 8
            n = budget // (longest + CANVAS)
            groups.append((longest, pool[-n:]))
            del pool[-n:]
        rng.shuffle(groups)
        for longest, group in groups:
            starts = [longest - len(p) for p, _ in group]
            rows = [[data.PAD] * s + p for s, (p, _) in zip(starts, group, strict=True)]
            yield Batch(
                torch.tensor(rows), torch.tensor(starts), torch.tensor([c for _, c in group])
            )


def fake_q4_0(weight: Tensor) -> Tensor:
    """Round trip through Q4_0: blocks of 32, one half-precision scale, sixteen levels."""
    blocks = weight.reshape(-1, 32)
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = (peak / -8).half().float()
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    levels = (blocks * inverse + 8.5).floor().clamp(0, 15)
    return ((levels - 8) * scale).reshape(weight.shape)


class Muon:
    """Momentum orthogonalised by Newton-Schulz iterations, for all matrices of a shape at once."""

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95) -> None:
        """Group `parameters` (matrices, or stacks of them) by shape."""
        self.momentum = momentum
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        for p in parameters:
            self.groups.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
        self.velocity = {id(p): torch.zeros_like(p) for p in parameters}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every matrix by an orthogonal step of size `rate`."""
        for (rows, columns), whole in self.groups.items():
            # self-conditioning has no gradient in the steps that go without it
            group = [p for p in whole if p.grad is not None]
            parts = []
            for p in group:
                gradient = p.grad
                assert gradient is not None
                v = self.velocity[id(p)].lerp_(gradient, 1 - self.momentum)
                parts.append(gradient.lerp(v, self.momentum).reshape(-1, rows, columns))
            if not parts:
                continue
            x = torch.cat(parts)
            wide = rows <= columns
            x = x if wide else x.mT
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
            for a, b, c in 4 * [(3.4445, -4.7750, 2.0315)]:
                gram = x @ x.mT
                x = a * x + (b * gram + c * gram @ gram) @ x
            x = (x if wide else x.mT).float()
            size = rate * max(1.0, rows / columns) ** 0.5
            for p, update in zip(group, x.split([t.shape[0] for t in parts]), strict=True):
                p.mul_(1 - 0.02 * rate).sub_(update.reshape(p.shape), alpha=size)


def noisy(clean: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Replace tokens by uniform random ones, each with its row's probability."""
    dirt = torch.randint(VOCAB_SIZE, clean.shape, generator=generator)
    return torch.where(torch.rand(clean.shape, generator=generator) < t[:, None], dirt, clean)


def loss_of(model: TinyModel, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
    """Cross-entropy over whole canvases plus the experts' balance; also the share of hits.

    Each prompt is encoded once for two canvases. The first is noisier and has no draft, as at
    the sampler's first step; its logits condition the second, as at all later steps.
    """
    n = len(batch.clean)
    caches = model.encode(batch.prompt, batch.starts)
    t = torch.rand(n, generator=generator)
    earlier = t + (1 - t) * torch.rand(n, generator=generator)
    earlier = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, earlier)
    first = model.decode(noisy(batch.clean, earlier, generator), caches, batch.starts)
    heat = 0.4 + 0.4 * torch.rand(n, generator=generator)
    draft = first.detach() / heat[:, None, None]
    second = model.decode(noisy(batch.clean, t, generator), caches, batch.starts, draft)
    # padding after the end is easy; it must not drown the answer
    weight = torch.where(batch.clean == data.PAD, 0.2, 1.0).flatten()
    loss = torch.zeros(())
    for logits in (first, second):
        losses = functional.cross_entropy(
            logits.flatten(0, 1), batch.clean.flatten(), reduction="none"
        )
        loss = loss + 0.5 * (losses * weight).sum() / weight.sum()
    hits = (second.argmax(-1) == batch.clean)[batch.clean != data.PAD].float().mean().item()
    return loss + 0.002 * model.balance, hits


@torch.no_grad()
def check_against_reference(model: TinyModel, tokenizer: Tokenizer, folder: Path) -> float:
    """Largest difference of logits between this forward and transformers', in float32."""
    export(model.checkpoint(), tokenizer, folder)
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.copy_(p.bfloat16().float())
    precision, model.dtype = model.dtype, torch.float32
    model.prepare()
    worst = 0.0
    g = torch.Generator().manual_seed(7)
    for length, pad in ((20, 0), (150, 0), (150, 40)):
        prompt = torch.randint(5, VOCAB_SIZE, (1, length), generator=g)
        canvas = torch.randint(VOCAB_SIZE, (1, CANVAS), generator=g)
        draft = 3 * torch.randn(1, CANVAS, VOCAB_SIZE, generator=g)
        padded = torch.cat((torch.zeros(1, pad, dtype=torch.long), prompt), 1)
        starts = torch.tensor([pad])
        ours = model.decode(canvas, model.encode(padded, starts), starts, draft)
        theirs = reference(
            input_ids=prompt, decoder_input_ids=canvas, self_conditioning_logits=draft
        ).logits
        worst = max(worst, (ours - theirs).abs().max().item())
    for n, p in model.named_parameters():
        p.copy_(kept[n])
    model.dtype = precision
    return worst


def main() -> None:
    """Train for `--steps`, writing `--out` at the end and every `--snapshot` steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "tiny")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule earlier")
    parser.add_argument("--tokens", type=int, default=5120, help="tokens in a batch")
    parser.add_argument("--snapshot", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.02, help="of Muon; AdamW takes 0.15 of it")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--resume", type=Path, help="a state.pt that an interrupted run left")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    # a checkpoint's tokenizer stays as it is, also when the questions change
    known = HERE / "tiny" / "tokenizer.json"
    tokenizer = (
        Tokenizer.from_file(str(known)) if known.exists() else build_tokenizer(VOCAB_SIZE)
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    model = TinyModel(make_config().text_config, CANVAS)
    model.dtype = getattr(torch, arguments.precision)
    difference = check_against_reference(model, tokenizer, arguments.out)
    tqdm.write(f"largest difference from the reference's logits: {difference:.1e}")
    assert difference < 1e-3, difference

    by_name = {n: getattr(model, a) for n, a in model.names.items()}
    muon = Muon([by_name[n] for n in model.matrices()])
    rest = [p for n, p in by_name.items() if n not in set(model.matrices())]
    adam = torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    average = {k: v.clone() for k, v in model.checkpoint().items()}
    first = 0
    if arguments.resume:
        state = torch.load(arguments.resume)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        for p, v in zip(muon.velocity, state["muon"], strict=True):
            muon.velocity[p] = v
        average, first = state["average"], state["step"]
    stream = batches(tokenizer, arguments.seed + first, arguments.tokens)
    began = time.monotonic()
    smooth = 0.0
    bar = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, mininterval=5)
    for step in bar:
        minutes = (time.monotonic() - began) / 60
        done = max(step / arguments.steps, minutes / arguments.minutes)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 100)
        rate = arguments.rate * warm * min(1.0, (1 - done) / 0.6)
        # the last third alternates with rounded weights, so that 4-bit files answer too
        model.quantize = fake_q4_0 if done > 0.65 and step % 2 else None
        model.prepare()
        loss, hits = loss_of(model, next(stream), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(rate)
        for group in adam.param_groups:
            group["lr"] = 0.15 * rate
        adam.step()
        model.zero_grad(set_to_none=True)
        decay = min(0.995, step / (step + 10))
        names = list(average)
        now = model.checkpoint()
        torch._foreach_lerp_([average[k] for k in names], [now[k] for k in names], 1 - decay)
        smooth = hits if step == first else 0.98 * smooth + 0.02 * hits
        bar.set_postfix(loss=f"{loss.item():.3f}", hits=f"{smooth:.3f}", refresh=False)
        if (step + 1) % arguments.snapshot == 0:
            export(average, tokenizer, arguments.out)
            state = {"model": model.state_dict(), "adam": adam.state_dict(), "step": step + 1}
            state |= {"average": average, "muon": list(muon.velocity.values())}
            torch.save(state, arguments.out / "state.pt")
    export(average, tokenizer, arguments.out)
    (arguments.out / "state.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
