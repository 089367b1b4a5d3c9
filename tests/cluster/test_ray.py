"""A local cluster of two workers: the server's replicas, and batches. Skipped where Ray is not."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import dgemma

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

KEY = "cluster-key"
QUESTIONS = [
    "What is the capital of France?",
    "Reverse the list: fox lamp river",
    "Repeat: the red fox sees a bell near the lake.",
    "What is the capital of Italy?",
]
SLOW = {"confidence_threshold": 1e-30, "max_denoising_steps": 300}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from dgemma.ray.cluster import connect

    connect("local")
    if ray.cluster_resources()["CPU"] < 2:
        pytest.skip("needs two processors")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def served(cluster: None, tiny_gguf: Path) -> Iterator[str]:
    from ray import serve

    from dgemma.ray import Settings, application

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    settings = Settings(
        model=str(tiny_gguf),
        alias="tiny",
        api_keys=[KEY],
        replicas=2,
        cpus=0.5,
        n_ctx=512,
        n_threads=1,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(settings), name="dgemma", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def http(served: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served, headers=headers, timeout=120, trust_env=False) as client:
        yield client


def chat(http: httpx.Client, *texts: str, **changes: Any) -> httpx.Response:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    body = {"messages": messages, "seed": 1, "max_tokens": 64, **changes}
    return http.post("/v1/chat/completions", json=body)


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def figures(http: httpx.Client) -> dict[str, float]:
    text = http.get("/metrics").text
    return {n: float(v) for n, v in re.findall(r"^(dgemma_\w+(?:\{.*\})?) (\S+)$", text, re.M)}


def streamed(http: httpx.Client, text: str, **changes: Any) -> str:
    body = {"messages": [{"role": "user", "content": text}], "stream": True, **changes}
    pieces = []
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                pieces.append(event["choices"][0]["delta"].get("content", ""))
    return "".join(pieces)


@pytest.fixture(scope="module")
def alone(tiny_gguf: Path) -> Iterator[Callable[[str], str]]:
    """What one model in this process answers."""
    with dgemma.DiffusionGemma(tiny_gguf, n_ctx=512, n_threads=2) as llm:

        def answer(question: str) -> str:
            messages = [{"role": "user", "content": question}]
            made = llm.create_chat_completion(messages, seed=1, max_tokens=64)
            return str(made["choices"][0]["message"]["content"])

        yield answer


def test_a_seed_gives_one_text_whichever_replica_answers(
    http: httpx.Client, alone: Callable[[str], str]
) -> None:
    before = figures(http)
    wanted = {question: alone(question) for question in QUESTIONS}
    for question in QUESTIONS:
        assert content(chat(http, question)) == wanted[question]
        assert streamed(http, question, seed=1, max_tokens=64) == wanted[question]
    after = figures(http)
    assert after["dgemma_requests_total"] - before["dgemma_requests_total"] == 8
    answered = [v for n, v in after.items() if n.startswith("dgemma_replica_requests_total{")]
    assert len(answered) == 2
    assert min(answered) > 0
    assert sum(answered) == after["dgemma_requests_total"]


def test_second_turns_find_their_prefix(http: httpx.Client) -> None:
    before = figures(http)
    firsts = [f"Question {i}: what is the capital of France?" for i in range(6)]
    answers = [content(chat(http, question)) for question in firsts]
    for question, answer in zip(firsts, answers, strict=True):
        content(chat(http, question, answer, "And of Italy?"))
    after = figures(http)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["dgemma_routed_total"] == 12
    assert gained["dgemma_prefix_hits_total"] == 6


def test_errors_and_the_key_are_the_servers_own(http: httpx.Client, served: str) -> None:
    wrong = http.post("/v1/chat/completions", json={"messages": []})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/nowhere").status_code == 404
    assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    for path in ("/v1/models", "/metrics"):
        refused = httpx.get(served + path, trust_env=False)
        assert refused.status_code == 401
    assert httpx.get(served + "/health", trust_env=False).status_code == 200


def test_a_client_that_goes_away_frees_its_replica(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **SLOW}
    body["max_denoising_steps"] = 10_000
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 60
    while figures(http)["dgemma_requests_live"] > 0:
        assert time.monotonic() < deadline, "a replica still works for a client that has gone"
        time.sleep(0.1)


def test_a_replica_is_killed_under_load_and_nothing_is_lost(
    http: httpx.Client, alone: Callable[[str], str]
) -> None:
    import ray

    wanted = {question: alone(question) for question in QUESTIONS}
    begun = threading.Semaphore(0)

    def ask(number: int) -> tuple[str, str]:
        question = QUESTIONS[number % len(QUESTIONS)]
        begun.release()
        if number % 2:
            return question, streamed(http, question, seed=1, max_tokens=64)
        return question, content(chat(http, question))

    def kill() -> None:
        for _ in range(8):
            begun.acquire()
        names = [
            entry["name"]
            for entry in ray.util.list_named_actors(all_namespaces=True)
            if "dgemma#replica#" in entry["name"]
        ]
        ray.kill(ray.get_actor(names[0], namespace="serve"))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        killed = pool.submit(kill)
        answers = list(pool.map(ask, range(32)))
        killed.result()
    assert [text for _, text in answers] == [wanted[question] for question, _ in answers]


def descendants_named(part: str) -> list[int]:
    """Processes of this one's tree whose command line has `part`."""
    parents, found = {}, []
    for entry in os.listdir("/proc"):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
            command = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError):
            continue
        if not entry.isdigit():
            continue
        parents[int(entry)] = int(stat.rsplit(")", 1)[1].split()[1])
        if part in command:
            found.append(int(entry))

    def is_ours(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return [process for process in found if is_ours(process)]


def test_a_worker_is_killed_in_a_batch_and_no_line_is_lost_or_doubled(
    cluster: None, tiny_gguf: Path, tmp_path: Path
) -> None:
    from dgemma.batch import run_batch
    from dgemma.ray import Settings
    from dgemma.ray.batches import on_cluster

    n_lines = 60
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for number in range(n_lines):
            messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
            body = {"messages": messages, "seed": 1, "max_tokens": 64}
            json.dump({"custom_id": str(number), "body": body}, file)
            file.write("\n")
    settings = Settings(model=str(tiny_gguf), n_ctx=512, n_threads=1, cpus=0.5)
    killed: list[int] = []

    def progress(done: int, failed: int, total: int) -> None:
        assert (failed, total) == (0, n_lines)
        if done >= 8 and not killed:
            killed.extend(descendants_named("ray::MapWorker")[:1])
            os.kill(killed[0], signal.SIGKILL)

    report = run_batch(source, out, on_cluster(settings, workers=2), progress=progress)
    assert killed
    assert (report.requests, report.failed) == (n_lines, 0)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["custom_id"] for record in records] == [str(i) for i in range(n_lines)]
    texts = [r["response"]["body"]["choices"][0]["message"]["content"] for r in records]
    assert all(texts[i] == texts[i % len(QUESTIONS)] for i in range(n_lines))
