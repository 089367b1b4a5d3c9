"""Damaged files, processes killed while they save, disks that fill up, and many threads.

    python tests/fuzz/hostile_files.py [--sessions 638] [--ggufs 3000] [--kills 80] [--disks 18] [--answers 360] [--seed 1]

Prints how many of each were tried and what became of them; exit code 1 where anything is a fault.
The model is tests/support/small_model.py's, for answers and kills models/tiny.
"""

# ruff: noqa: E501  # a table reads better in its lines

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import dgemma  # noqa: E402
import support.gguf_builder as b  # noqa: E402
from dgemma import DiffusionGemma, files  # noqa: E402
from dgemma.errors import Error  # noqa: E402
from dgemma.gguf_file import File  # noqa: E402
from dgemma.importance import save_importance  # noqa: E402
from dgemma.opening import check_file  # noqa: E402
from dgemma.values import Activations  # noqa: E402
from dgemma_convert import convert  # noqa: E402
from dgemma_convert.errors import ConvertError  # noqa: E402
from dgemma_convert.requantize import quantize  # noqa: E402
from support import small_model  # noqa: E402
from support.rewriting import _entry, rewrite  # noqa: E402

Found = tuple[Counter[str], list[str]]
EXTREMES = (0, 1, -1, 2**31 - 1, -(2**31), 0x7F800000, 0x7FC00000, 48, 7, 255)
CHECKSUM, HEADER, FINGERPRINT = 40, 48, 32  # native/engine/session_file.c draws them


# ---- Sessions ------------------------------------------------------------------------------------


def checksum(data: bytes) -> bytes:
    state = 0xCBF29CE484222325
    for byte in data[:CHECKSUM] + data[HEADER:]:
        state = ((state ^ byte) * 0x100000001B3) & (2**64 - 1)
    return struct.pack("<Q", state)


def sessions(folder: Path, n: int, draw: random.Random) -> Found:
    """Session files with changed bytes; every second one with a checksum that fits again."""
    ended: Counter[str] = Counter()
    faults = []
    path = folder / "session"
    with DiffusionGemma(
        small_model.write(folder / "small.gguf"), n_ctx=128, n_batch=8, n_threads=1
    ) as llm:
        prompt = [7 * i % 63 for i in range(40)]
        session = llm.default_session
        session.prefill(prompt)
        session.save(path)
        whole = path.read_bytes()
        canvas = [3] * llm.info.canvas_length
        expected = session.canvas_logits(canvas)
        for number in range(n):
            data = bytearray(whole)
            for _ in range(draw.randint(1, 3)):
                at = draw.choice((draw.randrange(HEADER), draw.randrange(len(data) + 1)))
                kind = draw.randrange(5)
                if kind == 0:
                    data[at : at + 1] = bytes([draw.randrange(256)])
                elif kind == 1:
                    data[at // 4 * 4 : at // 4 * 4 + 4] = (
                        draw.choice(EXTREMES) & 0xFFFFFFFF
                    ).to_bytes(4, "little")
                elif kind == 2:
                    del data[at:]
                elif kind == 3:
                    data[at:at] = data[at : at + 16]
                else:
                    data[at : at + 8] = b"\xff" * 8
            mended = number % 2 == 1 and len(data) >= HEADER
            if mended:
                data[FINGERPRINT:CHECKSUM] = whole[FINGERPRINT:CHECKSUM]
                data[CHECKSUM:HEADER] = checksum(bytes(data))
            path.write_bytes(data)
            before = list(session.tokens)
            try:
                session.load(path)
            except (Error, ValueError) as problem:
                ended["refused"] += 1
                if str(path) not in str(problem):
                    faults.append(f"session {number}: the error names no file: {problem}")
                if list(session.tokens) != before:
                    faults.append(f"session {number}: refused, but the session is another")
                continue
            ended["loaded"] += 1
            if not mended and bytes(data) != whole:
                faults.append(f"session {number}: damage was loaded")
            if not np.isfinite(session.canvas_logits(canvas)).all():
                faults.append(f"session {number}: not finite")
            path.write_bytes(whole)
            session.load(path)
        if not np.array_equal(session.canvas_logits(canvas), expected):
            faults.append("the session says something else than before")
    return ended, faults


# ---- GGUF files ----------------------------------------------------------------------------------


def damaged_gguf(source: Path, target: Path, draw: random.Random) -> None:
    """A copy whose container is whole, with one to three keys or tensors that make no sense."""
    with File(source) as file:
        entries = {
            name: _entry(name, *file.keys.type_of(name), value) for name, value in file.keys.items()
        }
        tensors = [
            (t.name, tuple(reversed(t.shape)), t.type.id, t.data.tobytes()) for t in file.tensors
        ]
    strange: tuple[Callable[[str], bytes], ...] = (
        lambda name: b.key(name, b.STRING, draw.choice(("", "x", "gemma4", "{{ 1", "\0"))),
        lambda name: b.key(name, b.UINT32, draw.choice((0, 1, 2, 3, 31, 2**31, 2**32 - 1))),
        lambda name: b.key(name, b.INT32, draw.choice((-1, -(2**31), 5))),
        lambda name: b.key(
            name, b.FLOAT32, draw.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
        ),
        lambda name: b.key(name, b.UINT64, 2**63),
        lambda name: b.key(name, b.BOOL, 1),
        lambda name: b.array(name, b.INT32, draw.choice(([], [1], [0] * 3, [1] * 64))),
        lambda name: b.array(
            name, b.STRING, draw.choice(([], ["a"], ["a"] * 64, ["a b"] * 3, ["a b c"]))
        ),
        lambda name: b.array(name, b.FLOAT32, [float("nan")] * 2),
        lambda name: b.array(name, b.BOOL, [1]),
    )
    added = ("tokenizer.chat_template", "tokenizer.ggml.eos_token_ids", "general.file_type", "split.count",
             "general.alignment", "diffusion-gemma.rope.dimension_count")  # fmt: skip
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.6:
            name = draw.choice((*entries, *added))
            if draw.random() < 0.2:
                entries.pop(name, None)
            else:
                entries[name] = draw.choice(strange)(name)
            continue
        at, kind = draw.randrange(len(tensors)), draw.randrange(5)
        name, sizes, type, data = tensors[at]
        if kind == 0:
            del tensors[at]
        elif kind == 1:
            tensors[at] = (name + draw.choice(("x", ".scale")), sizes, type, data)
        elif kind == 2:
            tensors[at] = (name, tuple(reversed(sizes)), type, data)
        elif kind == 3:
            tensors.append((f"{name}.more", sizes, type, data))
        else:
            numbers = bytearray(data)
            place = draw.randrange(len(data) // 4) * 4
            numbers[place : place + 4] = struct.pack(
                "<f", draw.choice((float("nan"), float("inf"), 1e38, -0.0))
            )
            tensors[at] = (name, sizes, type, bytes(numbers))
    written, body = [], b""
    for name, sizes, type, data in tensors:
        written.append(b.tensor(name, sizes, type, offset=len(body)))
        body += data + bytes(-len(data) % 32)
    target.write_bytes(b.gguf(list(entries.values()), written, body))


def ggufs(folder: Path, n: int, draw: random.Random) -> Found:
    """Each is opened and quantized: what `quantize` writes runs, and what is refused is one line."""
    ended: Counter[str] = Counter()
    faults = []
    source, damaged, out = folder / "small.gguf", folder / "damaged.gguf", folder / "out.gguf"
    tokens = ["a", "b", "ab", *(f"<{i}>" for i in range(3, small_model.VOCAB - 1)), "<turn|>"]
    merged = {  # lists that are empty are left out by what writes the new file
        "tokenizer.ggml.tokens": b.array("tokenizer.ggml.tokens", b.STRING, tokens),
        "tokenizer.ggml.merges": b.array("tokenizer.ggml.merges", b.STRING, ["a b"]),
    }
    rewrite(small_model.write(folder / "first.gguf"), source, merged)
    (folder / "first.gguf").unlink()
    quantize(source, out, "q8_0", threads=1)
    out.unlink()
    for number in range(n):
        damaged_gguf(source, damaged, draw)
        opens = True
        try:
            check_file(damaged)
        except (Error, ValueError) as problem:
            opens = False
            if "\n" in str(problem).strip() or not str(problem):
                faults.append(f"gguf {number}: not one line: {problem!r:.300}")
        except Exception as problem:
            faults.append(f"gguf {number}: opening: {type(problem).__name__}: {problem!s:.300}")
        outtype = draw.choice(("q8_0", "f16", "q4_0"))
        try:
            quantize(damaged, out, outtype, threads=1, force=True, allow_requantize=True)
        except ConvertError as problem:
            ended["opens, quantize refuses" if opens else "refused"] += 1
            if out.exists():
                faults.append(f"gguf {number}: refused, but left a file: {problem}")
        except Exception as problem:
            faults.append(f"gguf {number}: quantize: {type(problem).__name__}: {problem!s:.300}")
        else:
            ended["quantized"] += 1
            try:
                check_file(out)
            except Exception as problem:
                faults.append(f"gguf {number}: quantize wrote what does not open: {problem!s:.300}")
        left = [p.name for p in folder.iterdir() if p not in (source, damaged, out)]
        if left:
            faults.append(f"gguf {number}: left {left}")
        out.unlink(missing_ok=True)
    return ended, faults


# ---- Kills and full disks ------------------------------------------------------------------------


def kills(folder: Path, n: int, draw: random.Random) -> Found:
    """A process that saves a session over and over is killed: the file is the older or the newer one."""
    ended: Counter[str] = Counter()
    faults = []
    model, path = folder / "tiny.gguf", folder / "session"
    convert(ROOT / "models" / "tiny", model, "q8_0", progress=False)
    with DiffusionGemma(model, n_ctx=1024, n_threads=1) as llm:
        session = llm.default_session
        session.prefill(llm.tokenizer.encode("The old boat by the sea. " * 60)[:700])
        tokens = list(session.tokens)
        began = time.perf_counter()
        session.save(path)
        whole = time.perf_counter() - began
        copy = Path(shutil.copy(path, folder / "copy"))
        for number in range(n):
            if draw.random() < 0.3:
                path.unlink(missing_ok=True)
            was_there = path.exists()
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    own = llm.session()  # a session does not survive a fork
                    own.load(copy)
                    while True:
                        own.save(path)
                os._exit(9)
            time.sleep((1 + draw.random() * 8) * whole)  # a session's making and loading come first
            os.kill(child, signal.SIGKILL)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
                faults.append(f"kill {number}: saving ended by itself")
            left = [p for p in folder.iterdir() if p not in (model, path, copy)]
            ended["killed within a save" if left else "killed between saves"] += 1
            if path.exists():
                try:
                    session.load(path)
                except Error as problem:
                    faults.append(f"kill {number}: a broken file: {problem}")
                if list(session.tokens) != tokens:
                    faults.append(f"kill {number}: other tokens")
            elif was_there:
                faults.append(f"kill {number}: the older file is gone")
            session.save(path)
            left = [p.name for p in folder.iterdir() if p not in (model, path, copy)]
            if left:
                faults.append(f"kill {number}: the next save left {left}")
    return ended, faults


def disks(folder: Path, n: int, draw: random.Random) -> Found:
    """Every writer where only so many bytes fit: an error, the older file as it was, nothing beside it."""
    ended: Counter[str] = Counter()
    faults = []
    small = small_model.write(folder / "small.gguf")
    met = {"blk.0.attn_q.weight": Activations(np.ones((1, 4096)), np.array([5]))}
    with DiffusionGemma(small, n_ctx=128, n_batch=8, n_threads=1) as llm:
        prompt = [7 * i % 63 for i in range(60)]

        def save(path: Path) -> None:
            with llm.session() as session:
                session.prefill(prompt)
                session.save(path)

        writers: dict[str, Callable[[Path], Any]] = {
            "session": save,
            "text": lambda path: files.write_file(path, b"x" * 20_000),
            "convert": lambda path: convert(
                ROOT / "models" / "tiny", path, "q4_0", force=True, progress=False
            ),
            "quantize": lambda path: quantize(small, path, "q8_0", threads=1, force=True),
            "imatrix.dat": lambda path: save_importance(
                path, met, dataset="d", chunk_count=1, chunk_size=32
            ),
            "imatrix.gguf": lambda path: save_importance(
                path, met, dataset="d", chunk_count=1, chunk_size=32
            ),
        }
        for number in range(n):
            name = list(writers)[number % len(writers)]
            target = folder / f"target-{name}"
            target.write_bytes(b"the older one")
            room = (0, 100, 5000)[number // len(writers) % 3]
            child = os.fork()
            if child == 0:
                code = 1
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                with contextlib.suppress(BaseException):
                    try:
                        writers[name](target)
                    except (Error, OSError):
                        code = 0
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ended["error" if code == 0 else f"ended with {code}"] += 1
            if code != 0:
                faults.append(f"disk {number}: {name} with {room} bytes ended with {code}")
            if target.read_bytes() != b"the older one":
                faults.append(f"disk {number}: {name} with {room} bytes: the older file is lost")
            target.unlink()
            left = [p.name for p in folder.iterdir() if p != small]
            if left:
                faults.append(f"disk {number}: {name} with {room} bytes left {left}")
                for extra in left:
                    (folder / extra).unlink()
    return ended, faults


# ---- Threads -------------------------------------------------------------------------------------


def answers(folder: Path, n: int, draw: random.Random) -> Found:
    """Threads that ask one model, in sessions of their own and in its one session, as one alone would."""
    model = folder / "tiny.gguf"
    convert(ROOT / "models" / "tiny", model, "q8_0", progress=False)
    ended: Counter[str] = Counter()
    faults: list[str] = []
    asked = ["What is the capital of France?", "Count from 3 to 12.", "Reverse the word planet."]
    with DiffusionGemma(model, n_ctx=512, n_threads=1) as llm:

        def ask(number: int) -> str:
            messages = [{"role": "user", "content": asked[number % 3]}]
            made = llm.create_chat_completion(messages, seed=number % 4, max_tokens=24)
            return str(made["choices"][0]["message"]["content"])

        alone = [ask(number) for number in range(12)]
        waiting = list(range(n))
        draw.shuffle(waiting)
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    number = waiting.pop()
                try:
                    right = ask(number) == alone[number % 12]
                except Exception as problem:
                    faults.append(f"answer {number}: {problem!r}")
                    continue
                with lock:
                    ended["the same as alone" if right else "another"] += 1
                if not right:
                    faults.append(f"answer {number}: another than alone")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return ended, faults


KINDS = {"sessions": (sessions, 638), "ggufs": (ggufs, 3000), "kills": (kills, 80), "disks": (disks, 18), "answers": (answers, 360)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, (_, count) in KINDS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    n_faults = 0
    for name, (run, _) in KINDS.items():
        n = getattr(args, name)
        if n == 0:
            continue
        with tempfile.TemporaryDirectory() as folder:
            ended, faults = run(Path(folder), n, random.Random(args.seed))
        print(f"{name}: {n} tried: {dict(sorted(ended.items()))}, {len(faults)} faults", flush=True)
        n_faults += len(faults)
        for fault in faults[:20]:
            print(fault)
    return 1 if n_faults else 0


if __name__ == "__main__":
    assert dgemma.__file__
    sys.exit(main())
