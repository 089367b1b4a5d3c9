"""The tokenizer as GGUF keys: vocabulary, token types, merges, special tokens and chat template.

The keys and their types are those of the published Gemma 4 files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from gguf.gguf_writer import GGUFValue

from dgemma.chat.template import ChatTemplate
from dgemma.errors import Error

from .config import ModelConfig
from .errors import ConvertError
from .json_file import is_there, read_json, read_text

MODEL_NAME = "gemma4"
# Special in the tokenizer's sense, but their text belongs to the answer: as CONTROL tokens they
# would be dropped from it, and tool calls and channels could not be parsed.
TEXT_TOKENS = {
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|channel>",
    "<channel|>",
    '<|"|>',
}
# What ends an answer beside the tokenizer's own end token, where nothing else says so.
END_TOKENS = ("<turn|>", "<|tool_response>")
MAX_END_TOKENS = 16  # of the engine, the tokenizer's own among them
# Merges are ranked by their order; a constant score is what the published files hold.
SCORE = -1000.0
MAX_HOLES = 0.1  # share of the embedding's rows that may be without a token
# What Gemma's tokenizer does to a text before it looks for merges. Splitting at spaces comes too
# late to find any.
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PRE_TOKENIZERS = (
    None,
    {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
)
PROBE = ({"role": "user", "content": "Hello"},)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>\Z")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the form in which GGUF keeps it; tokens and types are ordered by id."""

    tokens: list[str]
    types: list[int]
    merges: list[str]  # "left right", most wanted first
    end_tokens: list[int]  # what ends an answer; the tokenizer's own end token first
    bos: int | None
    unknown: int | None
    padding: int | None
    mask: int | None
    add_bos: bool
    chat_template: str | list[dict[str, str]] | None  # one, or several with their names

    def add_to(self, keys: GGUFWriter) -> None:
        """Adds all tokenizer keys."""
        keys.add_tokenizer_model(MODEL_NAME)
        keys.add_token_list(self.tokens)
        keys.add_token_scores([SCORE] * len(self.tokens))
        keys.add_token_types(self.types)
        keys.add_token_merges(self.merges)
        if self.bos is not None:
            keys.add_bos_token_id(self.bos)
        keys.add_eos_token_id(self.end_tokens[0])
        keys.add_array("tokenizer.ggml.eos_token_ids", self.end_tokens)
        if self.unknown is not None:
            keys.add_unk_token_id(self.unknown)
        if self.padding is not None:
            keys.add_pad_token_id(self.padding)
        if self.mask is not None:
            keys.add_mask_token_id(self.mask)
        keys.add_add_bos_token(self.add_bos)
        keys.add_add_space_prefix(False)
        if self.chat_template:
            keys.add_chat_template(self.chat_template)


def token_type(token: str, special: bool) -> int:
    """GGUF's type of a token; `special`: it is matched whole, before any merging."""
    if special:
        return int(TokenType.USER_DEFINED if token in TEXT_TOKENS else TokenType.CONTROL)
    return int(TokenType.BYTE if _BYTE_TOKEN.match(token) else TokenType.NORMAL)


def read_vocabulary(
    folder: Path, config: ModelConfig, generation: dict[str, Any], notes: list[str]
) -> Vocabulary:
    """Reads the tokenizer files of a checkpoint; `generation` is its generation_config.json.

    ConvertError where they are missing or are not a tokenizer of Gemma's kind: BPE with byte
    fallback over text whose spaces are written `▁`.
    """
    return _Reader(folder, config, notes).vocabulary(generation)


class _Reader:
    """tokenizer.json and tokenizer_config.json of a folder."""

    def __init__(self, folder: Path, config: ModelConfig, notes: list[str]) -> None:
        self._folder, self._config, self._notes = folder, config, notes
        self._path = folder / "tokenizer.json"
        if not is_there(self._path):
            raise ConvertError(f"{self._path}: missing; the vocabulary is read from it")
        self._json = read_json(self._path)
        settings = folder / "tokenizer_config.json"
        self._settings = read_json(settings) if is_there(settings) else {}
        if not isinstance(self._json, dict) or not isinstance(self._settings, dict):
            raise ConvertError(f"{folder}: tokenizer files must be JSON objects")
        self._tokens: list[str] = []
        self._types: list[int] = []
        self._read_tokens()
        self._ids = {token: i for i, token in enumerate(self._tokens)}

    def vocabulary(self, generation: dict[str, Any]) -> Vocabulary:
        """Everything that goes into the file."""
        ends = self._end_tokens(generation)
        eos = self._special("eos_token", ends[0] if ends else None)
        if eos is None:
            raise ConvertError(f"{self._folder}: no file names an end token (eos_token)")
        bos = self._special("bos_token", self._config.bos_token_id)
        return Vocabulary(
            tokens=self._tokens,
            types=self._types,
            merges=self._read_merges(),
            end_tokens=list(dict.fromkeys([eos, *ends])),
            bos=bos,
            unknown=self._special("unk_token", self._ids.get("<unk>")),
            padding=self._special("pad_token", self._config.pad_token_id),
            mask=self._special("mask_token", self._ids.get("<mask>")),
            add_bos=bos is not None and self._settings.get("add_bos_token") is not False,
            chat_template=self._read_chat_template(),
        )

    def _fail(self, text: str) -> ConvertError:
        return ConvertError(f"{self._path}: {text}")

    def _read_tokens(self) -> None:
        model = self._json.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            raise self._fail("expected a BPE model with byte fallback")
        if model.get("byte_fallback") is not True:
            raise self._fail("expected byte_fallback to be true")
        self._check_pipeline(model)
        vocabulary, added = model.get("vocab"), self._json.get("added_tokens", [])
        if not isinstance(vocabulary, dict) or not isinstance(added, list):
            raise self._fail("expected a vocab object and an added_tokens list")

        n = self._config.vocab
        texts: list[str | None] = [None] * n
        types = [int(TokenType.UNUSED)] * n

        def put(token: Any, i: Any, kind: int) -> None:
            if not isinstance(token, str) or type(i) is not int or i < 0:
                raise self._fail(f"{token!r}: {i!r} is no entry of a vocabulary")
            if i >= n:
                raise self._fail(f"token {token!r} has id {i}; config.json says vocab_size = {n}")
            if texts[i] not in (None, token):
                raise self._fail(f"id {i} belongs to both {texts[i]!r} and {token!r}")
            try:
                token.encode()
            except UnicodeEncodeError as error:
                raise self._fail(f"token {i} is not valid Unicode") from error
            texts[i], types[i] = token, kind

        for token, i in vocabulary.items():
            put(token, i, token_type(token, special=False))
        for entry in added:
            if not isinstance(entry, dict):
                raise self._fail("added_tokens must be objects")
            token = entry.get("content")
            if entry.get("special") is True:
                put(token, entry.get("id"), token_type(str(token), special=True))
            else:
                put(token, entry.get("id"), int(TokenType.USER_DEFINED))

        # Rows of the embedding that no token uses still need a text, and each its own.
        self._tokens = [f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)]
        self._types = types
        if len(set(self._tokens)) != n:
            raise self._fail("two ids have the same text")
        if types.count(int(TokenType.BYTE)) != 256:
            raise self._fail("expected the 256 byte tokens <0x00> … <0xFF>")
        n_holes = texts.count(None)
        if n_holes > n * MAX_HOLES:
            raise self._fail(
                f"has {n - n_holes} tokens for the {n} rows of the embedding; it belongs to "
                "another model"
            )
        if n_holes:
            self._notes.append(
                f"{self._path}: {n_holes} rows of the embedding have no token: they are written as "
                "unused ones"
            )

    def _check_pipeline(self, model: dict[str, Any]) -> None:
        """The engine does what Gemma's tokenizer does before the merges, and nothing else."""
        for key, allowed in (
            ("dropout", (None, 0)),
            ("continuing_subword_prefix", (None, "")),
            ("end_of_word_suffix", (None, "")),
            ("ignore_merges", (None, False)),
        ):
            if model.get(key) not in allowed:
                raise self._fail(f"model.{key} is {model[key]!r}; Gemma's tokenizer has none")
        normalizer = self._json.get("normalizer")
        if _without_sequence(normalizer, "normalizers") != NORMALIZER:
            raise self._fail(
                f"the normalizer is {json.dumps(normalizer)[:100]}; expected Gemma's, which writes "
                "a space as ▁ and changes nothing else"
            )
        splitter = self._json.get("pre_tokenizer")
        if _without_sequence(splitter, "pretokenizers") not in PRE_TOKENIZERS:
            raise self._fail(
                f"the pre_tokenizer is {json.dumps(splitter)[:100]}; expected none, or Gemma's, "
                "which splits at spaces"
            )

    def _read_merges(self) -> list[str]:
        merges = self._json["model"].get("merges")
        if not isinstance(merges, list):
            raise self._fail("expected a list of merges")
        lines = []
        for merge in merges:
            try:
                left, right = merge.split(" ") if isinstance(merge, str) else merge
                known = left in self._ids and right in self._ids and left + right in self._ids
            except (TypeError, ValueError) as error:
                raise self._fail(f"merge {merge!r} is not a pair of tokens") from error
            if not known:
                raise self._fail(f"merge {merge!r} uses a token that is not in the vocabulary")
            if " " in left or " " in right:
                raise self._fail(f"merge {merge!r} has a space in a token; GGUF cannot say that")
            lines.append(f"{left} {right}")
        return lines

    def _special(self, name: str, default: int | None) -> int | None:
        """Id of a token that tokenizer_config.json names, as a string or as an object."""
        token = self._settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            if default is not None and default >= len(self._tokens):
                raise ConvertError(
                    f"{self._folder}: {name} has id {default}, beyond the vocabulary"
                )
            return default
        if not isinstance(token, str) or token not in self._ids:
            raise ConvertError(f"{self._folder}: {name} {token!r} is not in the vocabulary")
        return self._ids[token]

    def _end_tokens(self, generation: dict[str, Any]) -> list[int]:
        """Every token that ends an answer."""
        ends = generation.get("eos_token_id")
        if ends is None:
            ends = [*self._config.eos_token_ids]
            ends += [self._ids[token] for token in END_TOKENS if token in self._ids]
        ends = ends if isinstance(ends, list) else [ends]
        for end in ends:
            if type(end) is not int or not 0 <= end < len(self._tokens):
                raise ConvertError(
                    f"{self._folder}: eos_token_id {end!r} is not an id of the vocabulary"
                )
        if len(ends) >= MAX_END_TOKENS:
            raise ConvertError(
                f"{self._folder}: {len(ends)} end tokens; the engine knows {MAX_END_TOKENS - 1}"
            )
        return ends

    def _read_chat_template(self) -> str | list[dict[str, str]] | None:
        """The template, or all of them by name where there are more than the default one."""
        templates = self._named_templates()
        folder = self._folder / "additional_chat_templates"
        for path in sorted(folder.glob("*.jinja")) if folder.is_dir() else ():
            templates[path.stem] = read_text(path)
        if set(templates) <= {"default"}:
            return templates.get("default")
        return [{"name": name, "template": text} for name, text in templates.items()]

    def _named_templates(self) -> dict[str, str]:
        """Templates of the first place that has any, of the three where programs save them."""
        jinja, older = self._folder / "chat_template.jinja", self._folder / "chat_template.json"
        if is_there(jinja):
            return {"default": read_text(jinja)}
        template = self._settings.get("chat_template")
        if template is None and is_there(older):
            content = read_json(older)
            template = content.get("chat_template") if isinstance(content, dict) else content
            if template is None:
                raise ConvertError(f"{older}: expected an object with chat_template")
        if template is None:
            return {}
        if isinstance(template, str):
            return {"default": template}
        if isinstance(template, list) and all(
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
            for entry in template
        ):
            return {entry["name"]: entry["template"] for entry in template}
        raise ConvertError(
            f"{self._folder}: chat_template must be a text or a list of named templates"
        )


def _without_sequence(step: Any, parts: str) -> Any:
    """A step of the tokenizer; of a sequence of one or none, that one."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        steps = step.get(parts)
        if isinstance(steps, list) and len(steps) <= 1:
            return steps[0] if steps else None
    return step


def check_templates(folder: Path, keys: Mapping[str, GGUFValue], notes: list[str]) -> None:
    """ConvertError where a chat template does not compile, or not render a first message."""
    values = {name: value.value for name, value in keys.items()}
    prefix = "tokenizer.chat_template"
    for name in [name for name in values if name == prefix or name.startswith(prefix + ".")]:
        if not isinstance(values[name], str):
            continue
        what = name.removeprefix(prefix).removeprefix(".")
        what = f"the chat template {what!r}" if what else "the chat template"
        try:
            template = ChatTemplate({**values, prefix: values[name]})
            rendered = template.render(PROBE)
        except (Error, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConvertError(f"{folder}: {what} cannot render a message: {reason}") from error
        if PROBE[0]["content"] not in rendered:
            notes.append(f"{folder}: {what} leaves a user's message out of the prompt")
