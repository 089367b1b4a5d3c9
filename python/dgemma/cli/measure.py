"""What `dgemma bench` measures: loading, prefill, denoising steps, and this machine's limits."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._native import Session, measure_limits
from ..model import DiffusionGemma
from ..progress import progress_bar
from ..values import Limits, Operation, Sampling
from .shared import peak_rss_bytes

LONG_S = 3.0
"""A prefill that takes longer is measured once, a shorter one PREFILL_RUNS times."""
PREFILL_RUNS = 3


def measure(
    llm: DiffusionGemma,
    prompt_tokens: Sequence[int],
    contexts: Sequence[int],
    n_steps: int,
    began: float,
) -> dict[str, Any]:
    """The figures of a model whose loading began at `began` (of `time.perf_counter`)."""
    load_s = time.perf_counter() - began
    session, info = llm.default_session, llm.info
    sampling = dataclasses.replace(
        info.sampling,
        # So that a canvas never settles and no step is the last, which does less work.
        confidence_threshold=1e-30,
        max_denoising_steps=max(info.sampling.max_denoising_steps, n_steps + 2),
    )
    session.begin_canvas(sampling)
    stepping = time.perf_counter()
    session.step()
    stepped = time.perf_counter()
    first_step_s, first_step_ms = stepped - began, 1e3 * (stepped - stepping)

    prefill = []
    for n in prompt_tokens:
        with _session_for(llm, n) as fitting:
            prefill.append(_measure_prefill(fitting, n, info.n_vocab))
    session.truncate(0)
    n_past = min(prompt_tokens[0], session.n_ctx - info.canvas_length)
    session.append_random(n_past)
    times, operations = _measure_steps(session, sampling, n_steps)
    plan = llm.gpu_plan()
    peak = peak_rss_bytes()  # before longer contexts and the limits take memory of their own

    behind = []
    for n in contexts:
        with _session_for(llm, n) as fitting:
            fitting.truncate(0)
            fitting.append_random(n)
            measured = _measure_steps(fitting, sampling, n_steps)
        behind.append({"n_past": n, "step_ms": _spread(measured[0]), "work": measured[1]})

    limits = measure_limits(session.n_threads)
    for entry in [*prefill, *behind]:
        entry["operations"] = [_operation(o, limits) for o in entry.pop("work")]
    return {
        "model": os.path.basename(llm.model_path),
        "file_bytes": os.path.getsize(llm.model_path),
        "backend": info.backend_name,
        "threads": session.n_threads,
        "n_ctx": session.n_ctx,
        "canvas_length": info.canvas_length,
        "load_s": load_s,
        "first_step_s": first_step_s,
        "first_step_ms": first_step_ms,
        "prompt_tokens": prompt_tokens[0],
        "prefill_tokens_per_s": prefill[0]["tokens_per_s"],
        "prefill": prefill,
        "steps": n_steps,
        "step_ms": _spread(times),
        "operations": [_operation(o, limits) for o in operations],
        "contexts": behind,
        "limits": vars(limits),
        "shares": _shares(operations, limits),
        "peak_rss_bytes": peak,
        "peak_vram_bytes": plan.weights + plan.cache + plan.scratch if plan else None,
    }


@contextlib.contextmanager
def _session_for(llm: DiffusionGemma, n_past: int) -> Iterator[Session]:
    """A session with room for a canvas behind so many tokens: the model's own where that fits."""
    own = llm.default_session
    n_ctx = n_past + llm.info.canvas_length
    if n_ctx <= own.n_ctx:
        yield own
        return
    if n_ctx > llm.info.context_length:
        raise ValueError(
            f"{n_past} tokens and a canvas are more than the model's context of "
            f"{llm.info.context_length}"
        )
    with llm.session(n_ctx=n_ctx) as larger:
        yield larger


def _measure_prefill(session: Session, n: int, n_vocab: int) -> dict[str, Any]:
    prompt = np.random.default_rng(0).integers(0, n_vocab, n)
    times: list[float] = []
    while not times or (len(times) < PREFILL_RUNS and times[0] < LONG_S):
        session.truncate(0)
        session.reset_operations()
        began = time.perf_counter()
        session.prefill(prompt)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    return {
        "tokens": n,
        "tokens_per_s": n / seconds,
        "ms": _spread(times),
        "work": session.operations(),  # of the last run
    }


def _measure_steps(
    session: Session, sampling: Sampling, n_steps: int
) -> tuple[list[float], list[Operation]]:
    """Seconds of each step behind what is cached, and the work of one step on average."""
    session.begin_canvas(sampling)
    session.step()  # the only one without self-conditioning
    session.reset_operations()
    times: list[float] = []
    with progress_bar("steps", n_steps, unit="step") as bar:
        while len(times) < n_steps:
            began = time.perf_counter()
            session.step()
            times.append(time.perf_counter() - began)
            bar.update()
    return times, [
        dataclasses.replace(
            o, seconds=o.seconds / n_steps, flop=o.flop / n_steps, bytes=o.bytes / n_steps
        )
        for o in session.operations()
        if o.calls > 0
    ]


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    return {
        "median": 1e3 * statistics.median(seconds),
        "min": 1e3 * min(seconds),
        "max": 1e3 * max(seconds),
    }


def _operation(operation: Operation, limits: Limits) -> dict[str, Any]:
    seconds = operation.seconds or float("inf")
    return {
        "name": operation.name,
        "ms": 1e3 * operation.seconds,
        "gflop_per_s": operation.flop / seconds / 1e9,
        "gb_per_s": operation.bytes / seconds / 1e9,
        "shares": _shares([operation], limits),
    }


def _shares(operations: Sequence[Operation], limits: Limits) -> dict[str, float]:
    """What operations reached of each of the machine's limits, all their work counted as one kind.

    Most products are of int8, attention is of floats: the share of a unit that does not do the
    work may be more than 1.
    """
    seconds = sum(o.seconds for o in operations)
    if not seconds:
        return {}
    gb_per_s = sum(o.bytes for o in operations) / seconds / 1e9
    gflop_per_s = sum(o.flop for o in operations) / seconds / 1e9
    reached = {
        "read_gb_per_s": gb_per_s,
        "int8_gop_per_s": gflop_per_s,
        "bf16_gflop_per_s": gflop_per_s,
        "f32_gflop_per_s": gflop_per_s,
    }
    return {n: v / getattr(limits, n) for n, v in reached.items() if getattr(limits, n) > 0}
