"""Clients that go away at any byte of a request or an answer, in any way there is.

    python tests/fuzz/vanishing_clients.py MODEL.gguf [--clients 1800] [--seed 1]

Starts a server. Afterwards it has nothing to do, as few threads and handles as before, and answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.serving import SLOW, ask, running, wait_until_idle

MESSAGES = [{"role": "user", "content": "Count from 3 to 12."}]
REQUESTS = (
    ("/v1/chat/completions", {"messages": MESSAGES, "stream": True, "drafts": True, **SLOW}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 16}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 99, "stream": True, **SLOW}),
    ("/v1/responses", {"input": "Count from 3 to 12.", "stream": True, **SLOW}),
    ("/completion", {"prompt": "Count", "stream": True, **SLOW}),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 8}),
    ("/tokenize", {"content": "word " * 20_000}),
)


def vanish(address: tuple[str, int], draw: random.Random) -> str:
    """One client; how it went."""
    path, body = draw.choice(REQUESTS)
    data = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    )
    head = "\r\n".join(lines) + "\r\n\r\n"
    whole = head.encode() + data
    sent = draw.choice((len(whole), len(whole), draw.randrange(len(whole)), len(head)))
    with socket.create_connection(address, timeout=60) as client, contextlib.suppress(OSError):
        client.sendall(whole[:sent])
        if sent == len(whole):
            for _ in range(draw.choice((0, 0, 1, 3))):
                if not client.recv(draw.choice((1, 100, 4096))):
                    break
        how = draw.choice(("close", "reset", "half", "wait"))
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "half":
            client.shutdown(socket.SHUT_WR)
        elif how == "wait":
            time.sleep(draw.random() / 20)
        return f"{'whole' if sent == len(whole) else 'cut'}, {how}"
    return "gone"


def held(pid: int) -> tuple[int, int, float]:
    """Threads, handles and memory (MB) of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(status["Threads"]), handles, int(status["VmRSS"].split()[0]) / 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    ended: Counter[str] = Counter()
    with (
        running(args.model, "-t", 1) as (url, process),
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        address = (str(urlsplit(url).hostname), int(urlsplit(url).port or 0))
        for _ in range(8):
            ask(http)
        before = held(process.pid)
        lock, waiting = threading.Lock(), list(range(args.clients))

        def work() -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    draw = random.Random(args.seed * 100_000 + waiting.pop())
                how = vanish(address, draw)
                with lock:
                    ended[how] += 1

        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until_idle(http, 120)
        status = ask(http).status_code
        deadline = time.monotonic() + 60
        while held(process.pid)[1] > before[1] + 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        after = held(process.pid)
    print(f"{args.clients} vanishing clients: {dict(sorted(ended.items()))}")
    print(f"threads, handles, MB: {before} before, {after} after; an answer: {status}")
    said: str = process.said  # type: ignore[attr-defined]
    n_errors = said.count("dgemma: error ")
    print(f"the server ended with {process.returncode}; errors in its log: {n_errors}")
    right = status == 200 and after[1] <= before[1] + 2 and after[0] <= before[0] + 2
    if n_errors:
        print(said[-3000:])
    return 0 if right and process.returncode == 0 and not n_errors else 1


if __name__ == "__main__":
    sys.exit(main())
