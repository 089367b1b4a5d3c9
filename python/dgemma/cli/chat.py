"""`dgemma chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import Error, FileAccessError
from ..files import reason_of, write_file
from ..generation.events import Stats
from ..model import DiffusionGemma
from ..tools.answer import split_answer
from .live import LiveAnswer
from .shared import (
    Subparsers,
    add_length_options,
    add_model_options,
    add_sampling_options,
    load_model,
    request_options,
)

HELP = """\
/help            this list
/clear           begin a new conversation
/system TEXT     set the system message, and begin anew
/save F, /load F keep the conversation in a file, with what is encoded of it
                 in F.session, or take it up again
/stats           what the last answer took
/quit            leave, as Ctrl-D does
Ctrl-C stops an answer; twice, it leaves."""


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser("chat", help="talk with the model")
    add_chat_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """How a conversation goes."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--think", action="store_true", help="let the model think first")
    parser.add_argument("--plain", action="store_true", help="do not show the canvas settling")
    add_length_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Talks until the input ends."""
    request_options(args)  # wrong ones are said before a model is loaded
    with load_model(args) as llm:
        return talk(llm, args)


def talk(llm: DiffusionGemma, args: argparse.Namespace) -> int:
    """A conversation with a loaded model; returns the exit code."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing for input()
    conversation = Conversation(llm, args)
    if _is_terminal():
        print(f"{Path(llm.model_path).name}: /help lists the commands", file=sys.stderr)
    return conversation.loop()


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


class Conversation:
    """The messages so far, and the commands that change them."""

    def __init__(self, llm: DiffusionGemma, args: argparse.Namespace) -> None:
        self._llm, self._args = llm, args
        self._system: str | None = args.system
        self._messages: list[dict[str, Any]] = []
        self._stats: Stats | None = None
        self._interrupted = False  # the last thing that happened was Ctrl-C

    def loop(self) -> int:
        """Reads lines until the end; returns the exit code."""
        if sys.stdin is None:
            return 0
        prompt = "> " if _is_terminal() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if self._interrupted:
                    return 130
                self._interrupted = True
                continue
            if line in ("/quit", "/exit"):
                return 0
            try:
                if line:
                    self._interrupted = False
                if line.startswith("/"):
                    self._command(*line.partition(" ")[::2])
                elif line:
                    self._say(line)
            except KeyboardInterrupt:
                if self._interrupted:
                    return 130
                self._interrupted = True
            except BrokenPipeError:
                raise
            except (Error, OSError, ValueError, RecursionError) as problem:
                if getattr(problem, "errno", 0) == errno.ENOSPC and not isinstance(problem, Error):
                    raise  # of standard output: that of files is a FileAccessError
                print(f"dgemma: {problem}", file=sys.stderr)

    def _say(self, line: str) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        turn = {"role": "user", "content": line}
        prompt = self._llm.chat_template.render(
            [*system, *self._messages, turn], enable_thinking=self._args.think
        )
        answer = self._llm.answer(prompt, **request_options(self._args))
        live = not self._args.plain
        try:
            with LiveAnswer(self._llm.tokenizer, live=live) as display:
                for event in answer:
                    display.show(event)
        finally:  # what was said before Ctrl-C is part of the conversation
            content, _, _ = split_answer(answer.result.text)
            self._messages += [turn, {"role": "assistant", "content": content}]
            self._stats = answer.result.stats

    def _command(self, name: str, argument: str) -> None:
        argument = argument.strip()
        if name == "/help":
            print(HELP)
        elif name == "/clear":
            self._messages.clear()
        elif name == "/system":
            self._system = argument or None
            self._messages.clear()
        elif name == "/stats":
            print(_stats_text(self._stats))
        elif name in ("/save", "/load"):
            if not argument:
                raise ValueError(f"{name} needs the name of a file")
            if name == "/save":
                self._save(Path(argument))
            else:
                self._load(Path(argument))
        else:
            raise ValueError(f"there is no command {name}; /help lists them")

    def _save(self, path: Path) -> None:
        saved = {"system": self._system, "messages": self._messages}
        text = json.dumps(saved, ensure_ascii=False, indent=1)
        try:
            write_file(path, text)
        except OSError as problem:
            raise FileAccessError(f"{path}: {reason_of(problem)}") from problem
        self._llm.save(_session_path(path))

    def _load(self, path: Path) -> None:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            system, messages = saved["system"], saved["messages"]
            self._llm.chat_template.render([*messages, {"role": "user", "content": ""}])
        except (KeyError, TypeError, ValueError, RecursionError) as problem:
            raise ValueError(f"{path} is no saved conversation: {problem}") from problem
        self._system, self._messages = system, messages
        session = _session_path(path)
        if session.exists():  # without it, the next question encodes the conversation again
            try:
                self._llm.load(session)
            except Error as problem:
                print(f"dgemma: the conversation will be encoded again: {problem}", file=sys.stderr)


def _session_path(path: Path) -> Path:
    return path.with_name(path.name + ".session")


def _stats_text(stats: Stats | None) -> str:
    if stats is None:
        return "no answer yet"
    timings = stats.timings
    return (
        f"prompt {stats.prompt_tokens} tokens, {stats.cached_tokens} of them already encoded; "
        f"answer {stats.completion_tokens} tokens, "
        f"steps per canvas {', '.join(map(str, stats.steps)) or 0}; "
        f"{timings.get('total_s', 0):.2f} s, {timings.get('step_ms', 0):.1f} ms a step, "
        f"{timings.get('tokens_per_s', 0):.1f} tokens/s; seed {stats.seed}"
    )
