"""Fuzz targets for what Python parses: files of checkpoints, requests, answers of models, batches.

    python tests/fuzz/fuzz_python.py TARGET [libFuzzer's options] [corpus folders]
    python tests/fuzz/fuzz_python.py TARGET -runs=2000 -seed=1

With `atheris` installed libFuzzer drives it, by the edges that it reaches. Without it, or with
`-driver`, inputs are made from the seeds by the same changes, the same ones on every machine.

Each target says which errors an input may meet; anything else ends the run.
"""

# ruff: noqa: E402, E501  # atheris comes first; a table reads better in its lines

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHM = Path("/dev/shm")

try:
    if "-driver" in sys.argv:
        raise ImportError
    import atheris
except ImportError:
    atheris = None
from python_changes import changed_bytes, changed_json
from python_seeds import (
    BLOCKS,
    CHAT,
    FUNCTION,
    HEADER,
    INPUT,
    SAID,
    TURNS,
    dat,
    dumped,
    file_of,
    line,
    small_keys,
)

instrumented = (
    atheris.instrument_imports(include=["dgemma", "dgemma_convert"])
    if atheris and __name__ == "__main__"
    else contextlib.nullcontext()
)
with instrumented:
    from dgemma.batch import records
    from dgemma.chat.messages import normalized, prefilled
    from dgemma.compat.requests import ChatOptions, CompletionOptions, accept
    from dgemma.errors import Error, ModelFileError, OptionError
    from dgemma.generation.arguments import fitted
    from dgemma.generation.call_grammar import call_grammar
    from dgemma.generation.grammars import schema_grammar
    from dgemma.importance import Importance
    from dgemma.server import requests, schemas
    from dgemma.server.body import parse_json
    from dgemma.server.dialects import messages as anthropic
    from dgemma.server.dialects import responses
    from dgemma.server.failures import BadRequestError
    from dgemma.server.store import OwnPast, ResponseStore
    from dgemma.tokenizer import Tokenizer
    from dgemma.tools.answer import AnswerParser
    from dgemma.tools.declared import checked_tools, chosen_tools
    from dgemma.tools.reader import read_calls, read_object, write_call
    from dgemma_convert.checkpoint import INDEX_NAME, Checkpoint
    from dgemma_convert.config import ModelConfig, read_config
    from dgemma_convert.errors import ConvertError
    from dgemma_convert.safetensors_file import SafetensorsFile
    from dgemma_convert.tokenizer import read_vocabulary

Run = Callable[[bytes], None]
NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Target:
    """What is tried: `refusals` are the errors that it may end in. `is_json`: how inputs change."""

    run: Run
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    is_json: bool = True


def own_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory; those of runs that ended as libFuzzer ends, without a word, are removed."""
    base = SHM if os.access(SHM, os.W_OK) else Path(tempfile.gettempdir())
    for old in base.glob("fuzz-python-*-*"):
        if not Path("/proc", old.name.split("-")[2]).exists():
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.TemporaryDirectory(dir=base, prefix=f"fuzz-python-{os.getpid()}-")


_folder = own_folder()
FOLDER = Path(_folder.name)


def one_line(problem: Exception) -> None:
    """A refusal is one line, and says something."""
    text = str(problem)
    assert text, "an error without a text"
    assert "\n" not in text or isinstance(problem, OptionError | BadRequestError), text


# ---- Files ---------------------------------------------------------------------------------------


def safetensors(data: bytes) -> None:
    """A header, with its length before it, and as many bytes behind it as the first byte says."""
    if len(data) < 1:
        return
    path = FOLDER / "model.safetensors"
    path.write_bytes((len(data) - 1).to_bytes(8, "little") + data[1:] + bytes(data[0]))
    file = SafetensorsFile(path)
    for tensor in file.tensors.values():
        assert tensor.read(0, tensor.n_bytes).size == tensor.n_bytes
    file.close()


def index(data: bytes) -> None:
    """The index of a folder with two small files."""
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    for name in ("one.safetensors", "two.safetensors"):
        path = FOLDER / name
        if not path.exists():
            path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    (FOLDER / INDEX_NAME).write_bytes(data)
    with Checkpoint(FOLDER) as found:
        assert set(found.tensors) <= {"a"}
    (FOLDER / INDEX_NAME).unlink()


def config(data: bytes) -> None:
    """config.json."""
    (FOLDER / "config.json").write_bytes(data)
    found = read_config(FOLDER)
    assert found.vocab > 0
    assert found.layers


def tiny_config() -> ModelConfig:
    return read_config(ROOT / "models" / "tiny")


def vocabulary(data: bytes) -> None:
    """tokenizer.json of a folder with the rest of models/tiny, and the tokenizer that it gives."""
    (FOLDER / "tokenizer.json").write_bytes(data)
    found = read_vocabulary(FOLDER, tiny_config(), {"eos_token_id": 1}, [])
    assert len(found.tokens) == tiny_config().vocab == len(set(found.tokens))


def importance(data: bytes) -> None:
    """An importance matrix as llama.cpp once wrote it."""
    path = FOLDER / "imatrix.dat"
    path.write_bytes(data)
    Importance(path).of("blk.0.attn_q.weight", 1, 4)


def keys(data: bytes) -> None:
    """A tokenizer out of a GGUF file's keys."""
    given = json.loads(data)
    made = Tokenizer(given if isinstance(given, dict) else {})
    ids = made.encode("The old <|turn> boat é")
    made.decode(ids)
    assert all(0 <= id < len(made) for id in ids)


# ---- What models write ---------------------------------------------------------------------------


def calls(data: bytes) -> None:
    """Calls, whole and in pieces; those that were read are written and read again."""
    text = data.decode("utf-8", "replace")
    read_object(text)
    for name, arguments in read_calls(text).calls:
        if not NAME.fullmatch(name):
            continue
        again = read_calls(write_call(name, arguments)).calls
        assert [name for name, _ in again] == [name], (name, arguments, again)
    parser, cut = AnswerParser(), 1 + len(text) // 3
    pieces = [parser.feed(text[at : at + cut]) for at in range(0, len(text), cut)]
    for piece in [*itertools.chain(*pieces), *parser.finish()]:
        if piece.call is not None:
            assert isinstance(json.loads(piece.call.arguments), dict)


# ---- Requests ------------------------------------------------------------------------------------


def body(data: bytes) -> None:
    """A body of a request, as JSON within bounds."""
    parse_json(data)


def messages(data: bytes) -> None:
    """A conversation; a second time nothing is left to mend."""
    given = parse_json(data)
    prefilled(given)
    once = normalized(given)
    assert all(isinstance(message["role"], str) for message in once)
    json.dumps(once)


PAST = OwnPast(ResponseStore(0), "")
KINDS: tuple[tuple[type[schemas.Body], Callable[[dict[str, Any]], Any]], ...] = (
    (schemas.ChatRequest, lambda given: requests.chat_options(given, strict=False)),
    (schemas.CompletionRequest, lambda given: requests.completion_options(given, strict=True)),
    (
        schemas.ResponsesRequest,
        lambda given: requests.chat_options(responses.asked(given, PAST).fields, strict=False),
    ),
    (
        schemas.MessagesRequest,
        lambda given: requests.chat_options(anthropic.chat_fields(given), strict=False),
    ),
    (schemas.InfillRequest, dict),
    (schemas.TokenizeRequest, dict),
    (schemas.TemplateRequest, dict),
)


def request(data: bytes) -> None:
    """A body of each kind, up to what the engine is asked."""
    given = parse_json(data)
    for kind, options in KINDS:
        try:
            asked = options(schemas.checked(given, kind).given())
            if "messages" in asked:
                normalized(asked["messages"])
                chosen_tools(asked.get("tools"), asked.get("tool_choice"))
        except (OptionError, BadRequestError) as problem:
            one_line(problem)


def options(data: bytes) -> None:
    """Options alone."""
    given = parse_json(data)
    if isinstance(given, dict):
        for kind in (ChatOptions, CompletionOptions):
            accept(given, kind, unknown="ignore")


def tools(data: bytes) -> None:
    """Tools, the choice among them, and the grammar and the arguments of their calls."""
    given = parse_json(data)
    if not isinstance(given, dict):
        return
    _, names = chosen_tools(given.get("tools"), given.get("tool_choice"))
    chosen = [t for t in checked_tools(given.get("tools")) if t["function"]["name"] in names]
    if chosen:
        call_grammar(chosen, named=len(chosen) == 1)
        for tool in chosen:
            fitted({"a": "1", "b": [1.0, "x"]}, tool["function"].get("parameters"))


def schema(data: bytes) -> None:
    """A JSON schema, up to the grammar, which is made by a worker."""
    schema_grammar(parse_json(data), "response_format")


def batch(data: bytes) -> None:
    """A line of a batch is a request, or says why not."""
    line = records._line(1, data)
    assert (line.body is None) == (line.problem is not None)
    if line.body is not None:
        line.request()


# ---- The targets ----------------------------------------------------------------------------------

REFUSED = (OptionError, BadRequestError)
TARGETS = {
    "safetensors": Target(safetensors, (ConvertError,), lambda: [b"\x0c" + d for d in dumped(HEADER)], False),
    "index": Target(index, (ConvertError,), lambda: dumped({"weight_map": {"a": "one.safetensors"}},
                                                          {"weight_map": {"a": "two.safetensors"}})),
    "config": Target(config, (ConvertError,), file_of("config.json")),
    "vocabulary": Target(vocabulary, (ConvertError,), file_of("tokenizer.json")),
    "importance": Target(importance, (Error,), dat, False),
    "keys": Target(keys, (ModelFileError, ValueError), lambda: dumped(small_keys())),
    "calls": Target(calls, (), lambda: [text.encode() for text in SAID], False),
    "body": Target(body, REFUSED, lambda: dumped(CHAT, [1, -2.5e3, "é\\"]), False),
    "messages": Target(messages, REFUSED, lambda: dumped(TURNS, CHAT["messages"])),
    "request": Target(request, REFUSED, lambda: dumped(CHAT, INPUT, BLOCKS, {"prompt": ["a", [1, 2]]})),
    "options": Target(options, REFUSED, lambda: dumped(CHAT, {"top_k": 1, "mirostat": 2, "seed": 3})),
    "tools": Target(tools, REFUSED, lambda: dumped(CHAT, {"tools": INPUT["tools"]})),
    "schema": Target(schema, REFUSED, lambda: dumped(FUNCTION["parameters"], {"$ref": "#/$defs/a", "$defs": {}})),
    "batch": Target(batch, (), lambda: dumped(line(CHAT), line({"input": "x"}))),
}  # fmt: skip


def attempt(target: Target, data: bytes) -> bool:
    """Tries one input; whether it was accepted. What it may not end in is raised."""
    try:
        target.run(data)
    except target.refusals as problem:
        one_line(problem)
        return False
    except RecursionError:
        if target.run is not keys:  # json.loads of this program
            raise
    return True


def changed(target: Target, data: bytes, draw: random.Random) -> bytes:
    """Another input."""
    made = changed_json(data, draw) if target.is_json and draw.random() < 0.8 else None
    return changed_bytes(data, draw) if made is None else made


def drive(name: str, runs: int, seed: int) -> tuple[int, int]:
    """Without atheris: tries the seeds, and `runs` changes to them; how many were accepted."""
    target, draw = TARGETS[name], random.Random(seed)
    corpus = target.seeds()
    accepted = 0
    for data in corpus:
        assert attempt(target, data), f"{name}: a seed was refused"
    for _ in range(runs):
        data = changed(target, draw.choice(corpus), draw)
        try:
            taken = attempt(target, data)
        except BaseException:
            print(f"{name}: the input was {data[:2000]!r}", file=sys.stderr)
            raise
        accepted += taken
        if taken and len(corpus) < 400:
            corpus.append(data)  # changes to changes
    return runs, accepted


def main() -> None:
    """Runs one target."""
    arguments = [argument for argument in sys.argv[1:] if argument != "-driver"]
    name = next((a for a in arguments if not a.startswith("-")), "")
    if name not in TARGETS:
        raise SystemExit(f"usage: {sys.argv[0]} TARGET [options]; targets: {' '.join(TARGETS)}")
    arguments.remove(name)
    (FOLDER / "tokenizer_config.json").write_bytes(file_of("tokenizer_config.json")()[0])
    if atheris is None:
        given = dict(a.lstrip("-").split("=") for a in arguments if "=" in a)
        runs, accepted = drive(name, int(given.get("runs", 2000)), int(given.get("seed", 1)))
        print(f"{name}: {runs} changed inputs, {accepted} accepted: nothing found")
        return
    target = TARGETS[name]
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for number, data in enumerate(target.seeds()):
        (seeds / str(number)).write_bytes(data)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.3:
            return bytes(atheris.Mutate(data, max_size))
        return changed(target, data, draw)[:max_size]

    atheris.Setup(
        [sys.argv[0], *arguments, str(seeds)],
        lambda data: attempt(target, data),
        custom_mutator=mutator,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
