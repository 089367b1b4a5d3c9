"""Loads a running server: many clients at once, some of which vanish or read slowly.

    dgemma serve -m model.gguf --port 8080 &
    python bench/load_server.py http://127.0.0.1:8080 --pid $! --requests 1000

Prints how requests ended, how long the answered ones took, and the server's memory after the first
tenth and at the end. It needs `httpx`.
"""

import argparse
import collections
import json
import random
import statistics
import threading
import time
from pathlib import Path

import httpx

BODY = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 16,
    "stream": True,
}


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def one(client: httpx.Client, kind: str) -> str:
    """One request; returns how it ended."""
    with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        if response.status_code != 200:
            return str(response.status_code)
        for n, _ in enumerate(response.iter_lines()):
            if kind == "vanishing" and n == 0:
                return "vanished"
            if kind == "slow":
                time.sleep(0.05)
    return "200"


def main() -> None:
    """Runs the load and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    args = parser.parse_args()
    random_kind = random.Random(0)
    kinds = random_kind.choices(["plain", "slow", "vanishing"], [8, 1, 1], k=args.requests)
    ended: collections.Counter[str] = collections.Counter()
    seconds: list[float] = []
    memory: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        with httpx.Client(base_url=args.address, timeout=120, trust_env=False) as client:
            while True:
                with lock:
                    if not kinds:
                        return
                    kind = kinds.pop()
                began = time.perf_counter()
                end = one(client, kind)
                with lock:
                    ended[end] += 1
                    if end == "200" and kind == "plain":
                        seconds.append(time.perf_counter() - began)
                    if not memory and sum(ended.values()) >= args.requests // 10:
                        memory.append(rss_bytes(args.pid))
                if end == "503":
                    time.sleep(0.2)

    threads = [threading.Thread(target=work) for _ in range(args.clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = {
        "clients": args.clients,
        "requests": args.requests,
        "ended": dict(ended),
        "seconds": time.perf_counter() - began,
        "median_s": statistics.median(seconds) if seconds else None,
        "rss_after_a_tenth": memory[0],
        "rss_at_the_end": rss_bytes(args.pid),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
