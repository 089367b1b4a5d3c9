"""A stand-in for the real vocabulary, of any size, that encodes and decodes every text."""

from __future__ import annotations

import itertools

from .errors import ConvertError
from .tokenizer import Vocabulary, token_type

SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|turn>",
    "<turn|>",
    "<|image>",
    "<|audio>",
    "<|image|>",
    "<|audio|>",
    "<image|>",
    "<audio|>",
    "<|video|>",
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
CHARACTERS = ("▁", "\n", *map(chr, range(ord("!"), ord("~") + 1)))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n"
    "{{ message['content'] }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def synthetic_vocabulary(n: int) -> Vocabulary:
    """A BPE vocabulary of `n` tokens: special ones, bytes, ASCII, letter pairs, made-up words."""
    base = (*SPECIAL, *BYTES, *CHARACTERS)
    if n < len(base):
        raise ConvertError(f"a vocabulary of {n} tokens; at least {len(base)} are needed")
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    pairs = itertools.product("▁" + letters, letters)
    merges = [f"{left} {right}" for left, right in itertools.islice(pairs, n - len(base))]
    tokens = [*base, *(merge.replace(" ", "") for merge in merges)]
    # Words that no merge leads to: the model can emit them, the tokenizer never does.
    syllables = ["".join(pair) for pair in itertools.product("bcdfghjklmnpqrstvwxyz", "aeiou")]
    words = ("▁" + "".join(word) for word in itertools.product(syllables, repeat=4))
    tokens += itertools.islice(words, n - len(tokens))
    types = [token_type(token, token in SPECIAL) for token in tokens]
    ids = {token: i for i, token in enumerate(SPECIAL)}
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        end_tokens=[ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
        bos=ids["<bos>"],
        unknown=ids["<unk>"],
        padding=ids["<pad>"],
        mask=ids["<mask>"],
        add_bos=True,
        chat_template=CHAT_TEMPLATE,
    )
