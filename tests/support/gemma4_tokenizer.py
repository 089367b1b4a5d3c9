"""A checkpoint's tokenizer files made from the keys of a GGUF file with Gemma 4's vocabulary.

The released checkpoint has the same vocabulary in tokenizer.json; this is the way back to it, so
that the converter can be run on the real tokens and merges without a download.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTROL, USER_DEFINED = 3, 4
KEY = "tokenizer.ggml."
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding",
           "mask_token": "mask"}  # fmt: skip


def write_tokenizer(folder: Path, keys: Mapping[str, Any]) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja in `folder`."""
    tokens, types = keys[KEY + "tokens"], keys[KEY + "token_type"]
    added = [
        {"id": i, "content": tokens[i], "special": True, "normalized": False, "lstrip": False,
         "rstrip": False, "single_word": False}
        for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [line.split(" ") for line in keys[KEY + "merges"]],
        },
    }
    settings = {name: tokens[keys[f"{KEY}{key}_token_id"]] for name, key in SPECIAL.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(keys["tokenizer.chat_template"])
