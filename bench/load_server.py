"""Loads a running server: many clients at once, some of which vanish, read slowly or converse.

    dgemma serve -m model.gguf --port 8080 &
    python bench/load_server.py http://127.0.0.1:8080 --pid $! --requests 1000

Prints how requests ended, how long the answered ones took, and the server's memory after the first
tenth and at the end. `--second-turn` measures instead how long the prompt of a second turn takes
where another client's turn came between, and where none did: compare `--sessions 1` with more. It
needs `httpx`.
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


def conversation(client: httpx.Client) -> str:
    """Two turns; returns how the second one ended."""
    messages = [{"role": "user", "content": f"Count from {random.randrange(9)} to 12."}]
    body = {"messages": messages, "max_tokens": 16}
    first = client.post("/v1/chat/completions", json=body)
    if first.status_code != 200:
        return str(first.status_code)
    messages.append(first.json()["choices"][0]["message"])
    messages.append({"role": "user", "content": "What is the capital of France?"})
    return str(client.post("/v1/chat/completions", json=body).status_code)


# ---- A second turn -------------------------------------------------------------------------------


def prompt_seconds(client: httpx.Client, messages: list[dict[str, str]]) -> float:
    """What the prompt of an answer took, as the server says."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 1}
    body = {"messages": messages, "seed": 1, **options}
    text = client.post("/v1/chat/completions", json=body).text
    (figures,) = (line for line in text.split("\n") if '"timings"' in line)
    return float(json.loads(figures.removeprefix("data: "))["timings"]["timings"]["prompt_s"])


def second_turn(address: str, n_words: int, rounds: int) -> dict[str, float]:
    """Medians of a second turn's prompt: alone, and with another client's turn in between."""
    more = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"}]
    found: dict[str, list[float]] = {"first": [], "alone": [], "between": []}
    with httpx.Client(base_url=address, timeout=600, trust_env=False) as client:
        for n in range(rounds):
            for kind in ("alone", "between"):
                one, other = (
                    [{"role": "user", "content": f"{who} {n} {kind} " + "word " * n_words}]
                    for who in ("Anna", "Ben")
                )
                found["first"].append(prompt_seconds(client, one))
                if kind == "between":
                    prompt_seconds(client, other)
                found[kind].append(prompt_seconds(client, one + more))
    return {f"{name}_s": statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    """Runs the load and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--pid", type=int, help="the server's process")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--second-turn", action="store_true")
    parser.add_argument("--words", type=int, default=300, help="of a first turn")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.second_turn:
        print(json.dumps(second_turn(args.address, args.words, args.rounds)))
    elif args.pid is None:
        parser.error("--pid is needed: the server's process")
    else:
        print(json.dumps(load(args)))


def load(args: argparse.Namespace) -> dict[str, object]:
    """Asks with all clients at once, and says how it went."""
    random_kind = random.Random(0)
    kinds = random_kind.choices(
        ["plain", "conversation", "slow", "vanishing"], [6, 2, 1, 1], k=args.requests
    )
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
                end = conversation(client) if kind == "conversation" else one(client, kind)
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
    return {
        "clients": args.clients,
        "requests": args.requests,
        "ended": dict(ended),
        "seconds": time.perf_counter() - began,
        "median_s": statistics.median(seconds) if seconds else None,
        "rss_after_a_tenth": memory[0],
        "rss_at_the_end": rss_bytes(args.pid),
    }


if __name__ == "__main__":
    main()
