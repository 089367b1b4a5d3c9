"""What the targets of fuzz_python.py begin with."""

# ruff: noqa: E501  # requests read better in their lines

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"


def dumped(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


FUNCTION = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"enum": [1, 2]}, "c": {"$ref": "#/$defs/c"}},
        "required": ["city"],
        "$defs": {"c": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "integer"}}]}},
    },
}  # fmt: skip
TURNS: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": '{"sun":true}'},
    {"role": "user", "content": "And now?"},
]  # fmt: skip
CHAT = {
    "messages": TURNS, "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto",
    "max_tokens": 8, "temperature": 0.5, "stop": ["x"], "seed": 1, "n": 2, "logit_bias": {"1": 2},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": FUNCTION["parameters"]}},
    "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": True},
}  # fmt: skip
INPUT = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "sun"},
    ],
    "instructions": "Be brief.", "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"},
    "tools": [{"type": "function", **FUNCTION}, {"type": "custom", "name": "shell"}],
}  # fmt: skip
BLOCKS = {
    "system": [{"type": "text", "text": "Be brief."}], "max_tokens": 8,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"},
                                     {"type": "image", "source": {"type": "base64", "data": "AAAA"}}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"},
    "thinking": {"type": "enabled"},
}  # fmt: skip
SAID = (
    "<|tool_call>call:f{a:1,b:<|\"|>x<|\"|>,c:[true,null,{d:-1.5e3}]}<tool_call|>",
    '<|tool_call>{"name":"f","arguments":{"a":"\\u00e9"}}<tool_call|> and so on',
    "<|channel>thought\nWell.<channel|>Yes.<|tool_call>call:g(x=1, y='z')<tool_call|>",
    "call:f{a:<|\"|>never ended", "[{\"name\":\"f\"},{\"name\":\"g\"}]", "plain text",
)  # fmt: skip
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]},
}


def small_keys() -> dict[str, Any]:
    texts = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "a", "b", "ab", "▁", "<0x41>"]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3, 3, 3, 2, 3, 1, 1, 1, 1, 6],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def dat() -> list[bytes]:
    name = b"blk.0.attn_q.weight"
    values = struct.pack("<4f", 1, 2, 3, 4)
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 5, 4) + values
    return [struct.pack("<i", 1) + entry, struct.pack("<i", 1) + entry + struct.pack("<ii", 2, 4) + b"text"]  # fmt: skip


def file_of(name: str) -> Callable[[], list[bytes]]:
    return lambda: [(TINY / name).read_bytes()]


def line(request: Any) -> Any:
    return {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": request}
