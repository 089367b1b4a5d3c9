"""Requests that mean harm or make no sense, asked of the server's application without a socket.

    python tests/fuzz/hostile_requests.py MODEL.gguf [--cases 0] [--seed 1]

Every field of every API's request, and every value inside them, is replaced by STRANGE ones; then
some at once, and bodies that are no request at all. Prints how many there were and how they ended.
An answer of 500, an error without a text, and a request that never ends are faults.
"""

# ruff: noqa: E501  # a table reads better in its lines

from __future__ import annotations

import argparse
import asyncio
import collections
import copy
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from python_changes import STRANGE, places
from python_seeds import BLOCKS, CHAT, INPUT

from dgemma import DiffusionGemma
from dgemma.server.app import create_app
from dgemma.server.inprocess import HttpRequest, answer
from dgemma.server.local import LocalEngine

SECONDS = 120.0  # of one request, on a machine that does much else
SHORT = {"max_tokens": 4, "max_denoising_steps": 2}
TEXT = {"prompt": "The old boat", "stop": ["x"], "seed": 1, "temperature": 1, "echo": False, "n": 1}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, **SHORT, "n": 1},
    "/v1/completions": {**TEXT, **SHORT, "suffix": "by the sea", "stream": False, "user": "me"},
    "/v1/responses": {**INPUT, "max_output_tokens": 4, "max_denoising_steps": 2, "temperature": 1},
    "/v1/messages": {**BLOCKS, **SHORT},
    "/v1/messages/count_tokens": BLOCKS,
    "/completion": {"prompt": "x", "n_predict": 4, "max_denoising_steps": 2, "stop": []},
    "/infill": {
        "input_prefix": "a",
        "input_suffix": "b",
        "input_extra": [{"filename": "c", "text": "d"}],
        "prompt": "e",
        "n_predict": 2,
        "max_denoising_steps": 2,
    },
    "/tokenize": {"content": "x", "add_special": True, "parse_special": False, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/apply-template": {key: CHAT[key] for key in ("messages", "tools", "chat_template_kwargs")},
}
BODIES = (
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}" * 2, b'{"a":1,"a":2}', b"[" * 100_000, b'{"a":' * 100_000,
    b"1" * 100_000, b'"' + b"a" * 1_000_000 + b'"', b'{"prompt":"\\ud800"}', b'{"prompt":"\\u0000"}', b"NaN",
    b'{"messages":[' + b"{}," * 20_000 + b"{}]}", b'{"prompt":' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}",
    b'{"prompt":"' + b"\\n" * 500_000 + b'"}', b"\x1f\x8b\x08\x00", b"%PDF-1.4", b"a=b&c=d",
)  # fmt: skip


def one_at_a_time() -> Iterator[tuple[str, bytes]]:
    """Each value of each request in turn is each strange one."""
    for path, request in REQUESTS.items():
        for number in range(len(places(request))):
            for strange in STRANGE:
                made = copy.deepcopy(request)
                holder, key = places(made)[number]
                holder[key] = strange
                yield path, json.dumps(made).encode()


def several(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Up to five at once, names of other APIs' fields among them."""
    paths = list(REQUESTS)
    while True:
        path = draw.choice(paths)
        made = copy.deepcopy(REQUESTS[path])
        for _ in range(draw.randint(1, 5)):
            holder, key = draw.choice(places(made))
            if draw.random() < 0.3:
                holder, key = made, draw.choice(list(REQUESTS[draw.choice(paths)]))
            holder[key] = copy.deepcopy(draw.choice(STRANGE))
        yield path, json.dumps(made).encode()


def cases(n: int, seed: int) -> list[tuple[str, bytes]]:
    """`n` of them; 0: all that change one value, and a quarter as many that change several."""
    draw = random.Random(seed)
    bodies = [(path, body) for path in REQUESTS for body in BODIES]
    single = list(one_at_a_time())
    if n:
        draw.shuffle(single)
        draw.shuffle(bodies)
        bodies, single = bodies[: n // 10], single[: n // 2]
    mixed = several(draw)
    n_mixed = n - len(bodies) - len(single) if n else len(single) // 4
    return [*bodies, *single, *(next(mixed) for _ in range(n_mixed))]


async def tried(app: Any, path: str, body: bytes) -> tuple[str, str]:
    """How a request ended, and what is wrong with that."""
    request = HttpRequest("POST", path, body, [(b"content-type", b"application/json")])
    try:
        status, text = await asyncio.wait_for(answer(app, request), SECONDS)
    except Exception as problem:
        return "raised", repr(problem)
    if status == 200:
        # A stream's errors come inside of it.
        return "200", text.decode() if b'"server_error"' in text else ""
    if status not in (400, 404, 413, 415, 422, 503):
        return str(status), text.decode("utf-8", "replace")
    told = json.loads(text).get("error")
    return str(status), "" if isinstance(told, dict) and told.get("message") else text.decode()


async def run(model: Path, n: int, seed: int) -> int:
    ended: collections.Counter[str] = collections.Counter()
    faults, slowest = [], (0.0, "")
    with DiffusionGemma(model, n_ctx=512, n_threads=1) as llm:
        engine = LocalEngine(llm, name="tiny")
        app = create_app(engine)
        for path, body in cases(n, seed):
            began = time.monotonic()
            status, problem = await tried(app, path, body)
            ended[status] += 1
            slowest = max(slowest, (time.monotonic() - began, f"{path} {body[:200]!r}"))
            if problem:
                faults.append(f"{path} {body[:600]!r}: {status} {problem[:600]}")
        await engine.close()
    n_tried = sum(ended.values())
    print(f"{n_tried} hostile requests: {dict(sorted(ended.items()))}, {len(faults)} faults")
    print(f"the slowest took {slowest[0]:.2f} s: {slowest[1]}")
    for fault in faults[:40]:
        print(fault)
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cases", type=int, default=0, help="0: all of them")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    return asyncio.run(run(args.model, args.cases, args.seed))


if __name__ == "__main__":
    sys.exit(main())
