"""The tokenizer of the tiny DiffusionGemma."""

from __future__ import annotations

import json
import re

from tiny_data import BOS, SPECIAL_TOKENS, corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """BPE of the Gemma 4 kind: spaces are `▁`, unknown characters are bytes, no prefix space.

    Merges are learned within words only, so that digits, punctuation and line ends stay single
    tokens and a merge never depends on how a runtime splits its text before merging.
    """
    strip = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Za-z]+|[^A-Za-z]"), "isolated")
    printable = [chr(c) for c in range(33, 127)] + ["\n", "▁"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    runs = ["\n\n", "▁▁"]
    fixed = len(SPECIAL_TOKENS) + len(byte_tokens) + len(runs)
    trainer = BpeTrainer(
        vocab_size=vocab_size - fixed, initial_alphabet=printable, show_progress=False
    )
    texts = (strip.sub("\n", text) for text in corpus(20_000))
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = [*SPECIAL_TOKENS, *byte_tokens, *runs, *learned["vocab"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("\n", "\n"), ("▁", "▁"), *map(tuple, learned["merges"])]
    model = BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS]
    )
    return tokenizer
