"""Time and memory of converting a checkpoint, end to end, beside llama.cpp's two steps.

    python bench/convert.py --vocabulary vocab.gguf --outtype q4_0 --outtype q4_k_m
        [--llama-cpp SOURCES --llama-quantize build/bin/llama-quantize]

The checkpoint has two layers and the embedding of the released sizes, random BF16 weights, 2.4
billion in all. `vocab.gguf` is any GGUF file with Gemma 4's vocabulary, such as llama.cpp's
ggml-vocab-gemma-4.gguf. For llama.cpp, which does not know DiffusionGemma, the same weights are
written as a Gemma 4 checkpoint, which lacks only the self-conditioning (18 million weights) and the
encoder's scalars; its two steps are `convert_hf_to_gguf.py --outtype bf16` and `llama-quantize`.
Checkpoints are made in `--folder`, which needs 17 GB, and used again if they are there. Every
program finds its input in the page cache, as far as that is large enough; seconds and peak resident
memory are those of its process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from dgemma import _native
from dgemma_convert.config import ModelConfig
from dgemma_convert.synth import PRESETS
from dgemma_convert.tensors import MODEL_ROWS, layer_rows, row_shape
from support.gemma4_tokenizer import write_tokenizer

PROGRAM = "import sys; from dgemma.cli import main; sys.exit(main())"
# Random weights, repeated: drawing 2 billion takes longer than all that is measured.
POOL = 64 << 20
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    },
}


def shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a DiffusionGemma checkpoint."""
    for row in MODEL_ROWS:
        yield f"model.decoder.{row.checkpoint}", row_shape(config, row)
    for i, layer in enumerate(config.layers):
        for row in layer_rows(layer, split_experts=False):
            yield f"model.decoder.layers.{i}.{row.checkpoint}", row_shape(config, row, layer)
        yield f"model.encoder.language_model.layers.{i}.layer_scalar", (1,)


def write_weights(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of random BF16 weights."""
    header, end = {}, 0
    for name, shape in tensors.items():
        n_bytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    values = np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for first in range(0, end, len(pool)):
            file.write(pool[: end - first])


def text_config(config: ModelConfig) -> dict[str, object]:
    """What both checkpoints' config.json say of the network."""
    kinds = ["sliding_attention" if layer.sliding else "full_attention" for layer in config.layers]
    return {
        "hidden_size": config.hidden,
        "intermediate_size": config.feed_forward,
        "vocab_size": config.vocab,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.layers[0].n_kv_heads,
        "num_global_key_value_heads": config.layers[-1].n_kv_heads,
        "head_dim": config.sliding_head_dim,
        "global_head_dim": config.full_head_dim,
        "attention_k_eq_v": True,
        "layer_types": kinds,
        "num_experts": config.experts,
        "top_k_experts": config.experts_used,
        "moe_intermediate_size": config.expert_feed_forward,
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": ROPE,
        "final_logit_softcapping": config.softcap,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def write_checkpoints(folder: Path, vocabulary: Path, n_layers: int, *, gemma4: bool) -> None:
    """`folder`/diffusion and, if wanted, `folder`/gemma4."""
    released = PRESETS["26b-a4b"]
    layers = (released.layers[0],) * (n_layers - 1) + (released.layers[-1],)
    config = replace(released, layers=layers)
    with _native.File(vocabulary) as file:
        keys = dict(file.keys.items())
    text = text_config(config)
    diffusion = {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": config.canvas_length,
        "text_config": text,
    }
    plain = {
        **text,
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    }
    tensors = dict(shapes(config))
    causal = {
        name.replace("model.decoder.", "model."): shape
        for name, shape in tensors.items()
        if "encoder" not in name and "self_conditioning" not in name
    }
    for name, settings, own in (("diffusion", diffusion, tensors), ("gemma4", plain, causal)):
        if (folder / name).exists() or (name == "gemma4" and not gemma4):
            continue
        (folder / name).mkdir()
        write_tokenizer(folder / name, keys)
        (folder / name / "config.json").write_text(json.dumps(settings))
        write_weights(folder / name / "model.safetensors", own)


@dataclass(frozen=True)
class Cost:
    """Of one run of a program."""

    seconds: float
    cpu_seconds: float
    peak_gb: float


def run(words: list[str], source: Path, output: Path) -> Cost:
    """What a program that makes `output` costs; what it says goes to a log beside it."""
    with source.open("rb") as file:
        while file.read(64 << 20):
            pass
    os.sync()
    start = time.perf_counter()
    with output.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(words)} failed:\n{output.with_suffix('.log').read_text()[-2000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def report(what: str, cost: Cost, output: Path) -> None:
    """One line."""
    print(
        f"{what:<30} {cost.seconds:6.1f} s, {cost.cpu_seconds:6.1f} s of processors, "
        f"{cost.peak_gb:5.2f} GB resident, file {output.stat().st_size / 1e9:5.2f} GB",
        flush=True,
    )


def main() -> None:
    """Prints a line for each program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: temporary)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--outtype", action="append")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-cpp", type=Path, help="its source folder")
    parser.add_argument("--llama-quantize", type=Path, help="the built program")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        write_checkpoints(folder, args.vocabulary, args.layers, gemma4=bool(args.llama_cpp))
        compare(folder, args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Runs each program and prints its line."""
    source, threads = folder / "diffusion" / "model.safetensors", str(args.threads)
    outtypes = args.outtype or ["q4_0", "q4_k_m"]
    for outtype in outtypes:
        output = folder / f"{outtype}.gguf"
        words = [sys.executable, "-c", PROGRAM, "convert", str(source.parent), "--outtype", outtype]
        words += ["--outfile", str(output), "--threads", threads]
        report(f"dgemma convert, {outtype}", run(words, source, output), output)
        output.unlink()
    if not args.llama_cpp:
        return
    source, whole = folder / "gemma4" / "model.safetensors", folder / "bf16.gguf"
    words = [sys.executable, str(args.llama_cpp / "convert_hf_to_gguf.py"), str(source.parent)]
    words += ["--outtype", "bf16", "--outfile", str(whole)]
    report("convert_hf_to_gguf.py, bf16", run(words, source, whole), whole)
    for outtype in outtypes:
        output = folder / f"{outtype}-llama.gguf"
        words = [str(args.llama_quantize), str(whole), str(output), outtype.upper(), threads]
        report(f"llama-quantize, {outtype}", run(words, whole, output), output)
        output.unlink()
    whole.unlink()


if __name__ == "__main__":
    main()
