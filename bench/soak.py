"""Hours of mixed clients against one server: its memory, threads, handles and latency over time.

    python bench/soak.py model.gguf --minutes 60 --plot bench/results/soak.svg

Starts `dgemma serve` on a free port. Clients of every kind ask at once: plain and streamed answers,
conversations of several turns, the other APIs, prompts that do not fit, bodies that are no JSON,
streams that are left, readers that are slow, and bursts that fill the queue. `--reload N` starts
the server anew N times on the way. Prints one JSON object; needs `httpx`, and `matplotlib` for
`--plot`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

QUESTIONS = (
    "What is the capital of France?",
    "Count from 3 to 12.",
    "Is it sunny in Oslo?",
    "Reverse the word planet.",
)
SLOW = {"confidence_threshold": 1e-30, "max_denoising_steps": 200}


@contextlib.contextmanager
def server(model: str, options: list[str]) -> Iterator[tuple[str, int]]:
    """A server; its address and its process's number."""
    program = "import sys, dgemma.cli; sys.exit(dgemma.cli.main())"
    command = [sys.executable, "-c", program, "serve", "-m", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = None
    while address is None:
        line = process.stderr.readline()
        if not line:
            raise SystemExit(f"the server ended with {process.wait()}")
        address = re.search(r"dgemma: (http://\S+)", line)
    said = threading.Thread(target=process.stderr.read, daemon=True)  # or its pipe fills up
    said.start()
    try:
        yield address[1], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            print(f"the server ended with {process.returncode}", file=sys.stderr)


def sample(pid: int) -> dict[str, float]:
    """What a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "rss_mb": int(fields["VmRSS"].split()[0]) / 1000,
        "threads": int(fields["Threads"]),
        "handles": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


# ---- Clients -------------------------------------------------------------------------------------


def ask(http: httpx.Client, draw: random.Random) -> str:
    """One answer in one piece."""
    messages = [{"role": "user", "content": draw.choice(QUESTIONS)}]
    body = {"messages": messages, "max_tokens": 32, "top_p": 0.9}
    return str(http.post("/v1/chat/completions", json=body).status_code)


def stream(http: httpx.Client, draw: random.Random) -> str:
    """A stream that is read to its end, or left at some line."""
    messages = [{"role": "user", "content": draw.choice(QUESTIONS)}]
    body: dict[str, Any] = {"messages": messages, "stream": True, "drafts": draw.random() < 0.5}
    leave = draw.randrange(8) if draw.random() < 0.3 else -1
    if leave >= 0:
        body |= SLOW
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        for n, _ in enumerate(response.iter_lines()):
            if n == leave:
                return "left"
            if draw.random() < 0.01:
                time.sleep(0.1)  # a slow reader
        return str(response.status_code)


def converse(http: httpx.Client, draw: random.Random) -> str:
    """A conversation of three turns."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": f"Chat {draw.random()}."}]
    for question in draw.sample(QUESTIONS, 3):
        messages.append({"role": "user", "content": question})
        answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 16})
        if answer.status_code != 200:
            return str(answer.status_code)
        messages.append(answer.json()["choices"][0]["message"])
    return "200"


def other_apis(http: httpx.Client, draw: random.Random) -> str:
    """The other APIs, streamed."""
    question = draw.choice(QUESTIONS)
    path, body = draw.choice((
        ("/v1/responses", {"input": question, "stream": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": question}], "stream": True}),
        ("/completion", {"prompt": question, "n_predict": 16}),
        ("/infill", {"input_prefix": "The old ", "input_suffix": " by the sea.", "n_predict": 4}),
        ("/v1/completions", {"prompt": [question] * 3, "max_tokens": 8, "n": 2}),
        ("/tokenize", {"content": question * 2000}),
    ))  # fmt: skip
    return str(http.post(path, json=body).status_code)


def wrong(http: httpx.Client, draw: random.Random) -> str:
    """Requests that are refused; anything but a 4xx is a fault."""
    headers = {"Content-Type": "application/json"}
    long = json.dumps({"prompt": "word " * draw.choice((3000, 300_000))}).encode()
    body = draw.choice((b"{", b"[" * 5000, long, b'{"messages":[{"role":"robot"}]}', b"\xff"))
    answer = http.post("/v1/completions", content=body, headers=headers)
    return "refused" if 400 <= answer.status_code < 500 else f"wrong {answer.status_code}"


KINDS: tuple[tuple[Callable[[httpx.Client, random.Random], str], int], ...] = (
    (ask, 4),
    (stream, 5),
    (converse, 2),
    (other_apis, 3),
    (wrong, 2),
)


class Load:
    """The clients, how their requests ended, and how long /health took meanwhile."""

    def __init__(self, address: str, n_clients: int, seed: int) -> None:
        self.address, self.ended = address, collections.Counter[str]()
        self._probe = httpx.Client(base_url=address, timeout=60, trust_env=False)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(seed + i),))
            for i in range(n_clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, draw: random.Random) -> None:
        kinds, weights = zip(*KINDS, strict=True)
        with httpx.Client(base_url=self.address, timeout=120, trust_env=False) as http:
            while not self._stop.is_set():
                (kind,) = draw.choices(kinds, weights)
                try:
                    end = f"{kind.__name__} {kind(http, draw)}"
                except httpx.HTTPError as problem:
                    end = f"{kind.__name__} {type(problem).__name__}"
                with self._lock:
                    self.ended[end] += 1
                if end.endswith("503"):
                    self._stop.wait(draw.random())  # the queue is full

    def health(self) -> float:
        """Seconds that /health takes now."""
        self._probe.get("/health")
        began = time.perf_counter()
        self._probe.get("/health")
        return time.perf_counter() - began


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it, and returns what was seen."""
    samples: list[dict[str, float]] = []
    ended: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    share = 60 * args.minutes / (args.reload + 1)
    options = ["-c", "1024", "-t", str(args.threads), "--max-queue", str(args.max_queue)]
    for run in range(args.reload + 1):
        with server(args.model, options) as (address, pid):
            with Load(address, args.clients, 1000 * run) as load:
                until = began + share * (run + 1)
                while time.monotonic() < until:
                    time.sleep(args.every)
                    seen = {"minutes": (time.monotonic() - began) / 60, "run": run, **sample(pid)}
                    samples.append({**seen, "health_ms": 1e3 * load.health()})
            ended += load.ended
            idle = sample(pid)
        samples[-1] |= {f"{name}_idle": value for name, value in idle.items()}
    return {"args": vars(args), "ended": dict(sorted(ended.items())), "samples": samples}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The first and the last fifth of each run beside each other."""
    runs = []
    for run in range(found["args"]["reload"] + 1):
        seen = [s for s in found["samples"] if s["run"] == run]
        n = max(1, len(seen) // 5)
        entry: dict[str, Any] = {"samples": len(seen)}
        for name in ("rss_mb", "threads", "handles", "health_ms"):
            first, last = ([s[name] for s in part] for part in (seen[n : 2 * n], seen[-n:]))
            entry[name] = [round(statistics.median(part or [0.0]), 2) for part in (first, last)]
        runs.append(entry)
    total = sum(found["ended"].values())
    return {"requests": total, "ended": found["ended"], "runs": runs}


def plot(found: dict[str, Any], path: str) -> None:
    """A picture of the samples over time."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    names = {
        "rss_mb": "memory, MB",
        "threads": "threads",
        "handles": "handles",
        "health_ms": "/health, ms",
    }
    figure, axes = plt.subplots(len(names), 1, sharex=True, figsize=(8, 7))
    minutes = [s["minutes"] for s in found["samples"]]
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        axis.plot(minutes, [s[name] for s in found["samples"]], linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs the soak and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="GGUF file, such as models/tiny as Q8_0")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--max-queue", type=int, default=12, help="few, so that it fills up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reload", type=int, default=1, help="how often the server starts anew")
    parser.add_argument("--every", type=float, default=2, help="seconds between samples")
    parser.add_argument("--plot", metavar="F", help="draw the samples as SVG")
    args = parser.parse_args()
    found = soak(args)
    if args.plot:
        plot(found, args.plot)
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
