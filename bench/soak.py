"""Hours of mixed clients against one server: its memory, threads, handles and latency over time.

    python bench/soak.py model.gguf --minutes 60 --plot bench/results/soak.svg

Starts `dgemma serve` on a free port. Clients of every kind ask at once: plain and streamed answers,
conversations of several turns, the other APIs, prompts that are long, prompts that do not fit,
bodies that are no JSON, streams that are left, readers that are slow, and bursts that fill the
queue. `--rate` bounds how many begin a second, so that a machine can do other things meanwhile.
Afterwards the server is started anew `--reload` times, a twentieth of the time each. Prints one
JSON object; needs `httpx`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
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

from dgemma.charts import Series, chart, stacked
from dgemma.files import write_file

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
    """What a process and those that it started hold, and the processor time of its own."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        "rss_mb": _field(pid, "VmRSS") / 1000,
        "workers_mb": sum(_field(child, "VmRSS") for child in children) / 1000,
        "threads": _field(pid, "Threads"),
        "handles": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "cpu_s": (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK"),
    }


def _field(pid: int | str, name: str) -> int:
    with contextlib.suppress(FileNotFoundError):  # a worker that is being replaced
        status = Path(f"/proc/{pid}/status").read_text()
        return int((re.search(rf"^{name}:\s+(\d+)", status, re.M) or [0, 0])[1])
    return 0


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


def long_prompt(http: httpx.Client, draw: random.Random) -> str:
    """A prompt that fills most of the context."""
    body = {"prompt": " ".join(draw.choices(QUESTIONS, k=60)), "max_tokens": 8}
    return str(http.post("/v1/completions", json=body).status_code)


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
    (long_prompt, 1),
    (wrong, 2),
)


class Pace:
    """When the next request may begin: `rate` a second, 0 for at once, but all in a burst."""

    def __init__(self, rate: float, burst_every: float) -> None:
        self._rate, self._every, self._lock = rate, burst_every, threading.Lock()
        self._next = self._burst = time.monotonic()
        self._left = 0

    def wait(self, stop: threading.Event, draw: random.Random, n_clients: int) -> None:
        """Waits for a request's turn."""
        with self._lock:
            now = time.monotonic()
            if self._every and now - self._burst > self._every:
                self._burst, self._left = now, 2 * n_clients
            if not self._rate or self._left > 0:
                self._left -= 1
                return
            self._next = max(self._next, now) + draw.expovariate(self._rate)
            begin = self._next
        while not stop.is_set() and time.monotonic() < begin and self._left <= 0:
            stop.wait(min(0.5, max(0.0, begin - time.monotonic())))


class Load:
    """The clients, how their requests ended, and how long /health took meanwhile."""

    def __init__(self, address: str, n_clients: int, seed: int, pace: Pace) -> None:
        self._pace = pace
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
                self._pace.wait(self._stop, draw, len(self._threads))
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
    options = ["-c", "1024", "-t", str(args.threads), "--max-queue", str(args.max_queue)]
    for run in range(args.reload + 1):
        with server(args.model, options) as (address, pid):
            pace = Pace(args.rate, args.burst)
            with Load(address, args.clients, 1000 * run, pace) as load:
                until = began + 60 * args.minutes * (1 + run / 20)
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
        for name in ("rss_mb", "workers_mb", "threads", "handles", "health_ms"):
            first, last = ([s[name] for s in part] for part in (seen[n : 2 * n], seen[-n:]))
            entry[name] = [round(statistics.median(part or [0.0]), 2) for part in (first, last)]
        if seen:
            entry["cpu_s"] = seen[-1]["cpu_s"]
        runs.append(entry)
    total = sum(found["ended"].values())
    return {"requests": total, "ended": found["ended"], "runs": runs}


def plot(found: dict[str, Any]) -> str:
    """The samples over time, a few hundred of them."""
    names = {
        "rss_mb": "memory, MB",
        "workers_mb": "its workers', MB",
        "threads": "threads",
        "handles": "handles",
        "health_ms": "/health, ms",
    }
    samples = found["samples"][:: max(1, len(found["samples"]) // 300)]
    charts = []
    for name, label in names.items():
        line = Series(label, [(s["minutes"], s[name]) for s in samples], joined=True)
        charts.append(chart(label, "minutes", "", [line], logarithmic=False))
    return stacked(charts)


def main() -> None:
    """Runs the soak and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="GGUF file, such as models/tiny as Q8_0")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--max-queue", type=int, default=12, help="few, so that it fills up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--reload", type=int, default=1, help="how often the server starts anew after it"
    )
    parser.add_argument("--rate", type=float, default=0, help="requests a second; 0: no bound")
    parser.add_argument("--burst", type=float, default=60, help="seconds between bursts; 0: none")
    parser.add_argument("--every", type=float, default=2, help="seconds between samples")
    parser.add_argument("--plot", metavar="F", help="draw the samples as SVG")
    parser.add_argument("--samples", metavar="F", help="keep the samples as JSON")
    args = parser.parse_args()
    found = soak(args)
    if args.samples:
        Path(args.samples).write_text(json.dumps(found))
    if args.plot:
        write_file(args.plot, plot(found))
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
