"""What a cluster costs and brings, measured on one machine with models/tiny.

    python bench/cluster.py [--prompts 2000] [--requests 200]

Starts the plain server, then a local Ray cluster of two workers, and prints, beside each other:
a request's time (median, 99 %) through both; the throughput of a batch in one process and over two
workers; the share of second turns that find their prefix with and without affinity; what is lost
when a worker and a replica are killed; how long the cluster takes from one replica to two; and
the memory of two replicas that map one file. The results go to bench/results/cluster.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from dgemma import DiffusionGemma  # noqa: E402
from dgemma.batch import run_batch  # noqa: E402
from dgemma.batch.run import in_this_process  # noqa: E402
from dgemma.ray import Settings, application  # noqa: E402
from dgemma.ray.batches import on_cluster  # noqa: E402
from dgemma.ray.cluster import connect  # noqa: E402
from dgemma_convert import convert  # noqa: E402
from support.serving import running  # noqa: E402

PORT = 8171
CONVERSATIONS = 20
CITIES = ["France", "Italy", "Spain", "Japan", "Norway", "Egypt", "Peru", "Kenya"]


def ask(http: httpx.Client, *texts: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    body = {"messages": messages, "seed": 1, "max_tokens": 32}
    response = http.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


def client(address: str) -> httpx.Client:
    return httpx.Client(base_url=address, timeout=300, trust_env=False)


@contextlib.contextmanager
def cluster(model: Path, **changes: Any) -> Iterator[str]:
    given = {"replicas": 2, "cpus": 0.5, "n_ctx": 512, "n_threads": 1, "alias": "tiny"}
    settings = Settings(model=str(model), **{**given, **changes})
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(application(settings), name="dgemma", route_prefix="/")
    try:
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.delete("dgemma")


def latencies(address: str, n: int) -> tuple[float, float]:
    """Median and 99th percentile of a request's time, one after another, in ms."""
    times = []
    with client(address) as http:
        for number in range(n + 10):
            began = time.perf_counter()
            ask(http, f"What is the capital of {CITIES[number % len(CITIES)]}?")
            times.append(1000 * (time.perf_counter() - began))
    times = sorted(times[10:])
    return statistics.median(times), times[int(0.99 * len(times))]


def write_batch(path: Path, n: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number in range(n):
            question = f"What is the capital of {CITIES[number % len(CITIES)]}?"
            body = {"messages": [{"role": "user", "content": question}], "seed": number}
            json.dump({"custom_id": str(number), "body": {**body, "max_tokens": 32}}, file)
            file.write("\n")


def batch(source: Path, answer: Any, progress: Callable[..., None] | None = None) -> float:
    """Seconds of a batch; every line must have been answered once and well."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        report = run_batch(source, out, answer, progress=progress)
        names = [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]
    assert report.failed == 0, report
    assert names == [str(i) for i in range(report.requests)]
    return report.seconds


def descendants(part: str) -> list[int]:
    """Processes that this one has started, itself or through others, with `part` in their title."""
    parents, found = {}, []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{entry}/stat").read_text()
            parents[int(entry)] = int(stat.rsplit(")", 1)[1].split()[1])
            if part in Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace"):
                found.append(int(entry))

    def is_ours(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return [process for process in found if is_ours(process)]


def prefix_hits(address: str, n: int) -> float:
    """The share of tokens of second turns that were encoded already, for `n` conversations."""
    order = list(range(n))
    random.Random(0).shuffle(order)
    with client(address) as http:
        firsts = [f"Conversation {i}. What is the capital of France?" for i in range(n)]
        answers = [ask(http, first) for first in firsts]
        before = counters(http)
        for i in order:
            ask(http, firsts[i], answers[i], "And of Italy?")
        after = counters(http)
    gained = {name: after[name] - before[name] for name in ("prompt_tokens", "cached_tokens")}
    return gained["cached_tokens"] / gained["prompt_tokens"]


def counters(http: httpx.Client) -> dict[str, float]:
    found = {}
    for line in http.get("/metrics").text.splitlines():
        name, _, value = line.partition(" ")
        if name.startswith("dgemma_") and name.endswith("_total"):
            found[name.removeprefix("dgemma_").removesuffix("_total")] = float(value)
    return found


def killed_replica(address: str, n: int) -> tuple[int, int]:
    """Requests that were asked and lost while a replica is killed."""

    def kill() -> None:
        time.sleep(1)
        names = [
            entry["name"]
            for entry in ray.util.list_named_actors(all_namespaces=True)
            if "dgemma#replica#" in entry["name"]
        ]
        ray.kill(ray.get_actor(names[0], namespace="serve"))

    def one(number: int) -> bool:
        with client(address) as http, contextlib.suppress(httpx.HTTPError):
            return bool(ask(http, f"Question {number}: what is the capital of France?"))
        return False

    killer = threading.Thread(target=kill)
    killer.start()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answered = sum(pool.map(one, range(n)))
    killer.join()
    return n, n - answered


def seconds_to_two(model: Path) -> float:
    """From the first of many requests to the second replica's first answer."""
    with cluster(model, replicas=1, max_replicas=2, target_ongoing_requests=1.0) as address:
        began, done = time.perf_counter(), threading.Event()

        def load(number: int) -> None:
            with client(address) as http:
                while not done.is_set():
                    ask(http, f"Question {number}: what is the capital of France?")

        with concurrent.futures.ThreadPoolExecutor(8) as pool, client(address) as http:
            for number in range(8):
                pool.submit(load, number)
            while "dgemma_replicas 2" not in http.get("/metrics").text:
                time.sleep(0.2)
                if time.perf_counter() - began > 300:
                    break
            done.set()
    return time.perf_counter() - began


def memory(title: str) -> list[tuple[float, float]]:
    """Resident and proportional memory of each process with that title, in MB."""
    found = []
    for process in descendants(title):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
            found.append((sizes["Rss"], sizes["Pss"]))
    return found


Note = Callable[[str, str], None]


def measure_serving(model: Path, n_requests: int, note: Note) -> None:
    with running(model, "-t", 1) as (address, _):
        median, worst = latencies(address, n_requests)
    note("a request, plain server", f"{median:.1f} ms (99 %: {worst:.1f})")
    turns = f"second turns of {CONVERSATIONS} conversations"
    with running(model, "-t", 1, "--sessions", CONVERSATIONS) as (address, _):
        found = prefix_hits(address, CONVERSATIONS)
    note(f"{turns}, plain server", f"{found:.0%} of their tokens were encoded before")
    connect("local")
    with cluster(model) as address:
        median, worst = latencies(address, n_requests)
        note("a request, through the cluster", f"{median:.1f} ms (99 %: {worst:.1f})")
        sizes = [f"{rss:.0f} ({pss:.0f})" for rss, pss in memory("ServeReplica:dgemma:replica")]
        note("memory of the replicas, resident (proportional)", f"{', '.join(sizes)} MB")
        asked, lost = killed_replica(address, 200)
        note("a replica killed under load", f"{lost} of {asked} requests lost")
    for affinity in (True, False):
        with cluster(model, affinity=affinity, sessions=CONVERSATIONS) as address:
            found = prefix_hits(address, CONVERSATIONS)
        note(f"{turns}, {'with' if affinity else 'without'} affinity", f"{found:.0%}")
    note("from one replica to two", f"{seconds_to_two(model):.0f} s")
    serve.shutdown()


def measure_batches(model: Path, n: int, note: Note) -> None:
    settings = Settings(model=str(model), n_ctx=512, n_threads=1, cpus=1)
    source = model.with_name("in.jsonl")
    write_batch(source, n)
    killed: list[int] = []

    def kill(done: int, failed: int, total: int) -> None:
        if done > total // 3 and not killed:
            killed.extend(descendants("ray::MapWorker")[:1])
            os.kill(killed[0], signal.SIGKILL)

    with DiffusionGemma(model, n_ctx=512, n_threads=1) as llm:
        alone = batch(source, in_this_process(llm, alias="tiny"))
    note(f"{n} prompts, one process", f"{n / alone:.1f} a second")
    both = batch(source, on_cluster(settings, workers=2))
    note(f"{n} prompts, two workers", f"{n / both:.1f} a second")
    again = batch(source, on_cluster(settings, workers=2), kill)
    note("the same, a worker killed", f"{n / again:.1f} a second, no line lost or doubled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=2000, help="lines of the batches")
    parser.add_argument("--requests", type=int, default=200, help="for the times of requests")
    args = parser.parse_args()
    rows = [
        "# A cluster of two workers on one machine",
        "",
        f"`python bench/cluster.py`, models/tiny as Q8_0, {os.cpu_count()} processors, "
        f"Ray {ray.__version__}, {time.strftime('%d %B %Y')}.",
        "",
        "| | |",
        "| --- | --- |",
    ]

    def note(what: str, text: str) -> None:
        rows.append(f"| {what} | {text} |")
        print(f"{what}: {text}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny.gguf"
        convert(REPOSITORY / "models" / "tiny", model, "q8_0", progress=False)
        measure_serving(model, args.requests, note)
        measure_batches(model, args.prompts, note)
        ray.shutdown()
    results = REPOSITORY / "bench" / "results" / "cluster.md"
    results.write_text("\n".join([*rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
