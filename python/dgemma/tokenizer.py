"""Text to token ids and back, from the metadata of a model file alone.

The tokenizer is that of Gemma 4: byte-pair merges over whole text in which a space is written `▁`,
with one token per byte for what the vocabulary lacks. `▁` itself therefore comes back as a space.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers

from .errors import ModelFileError, OptionValueError
from .marks import MarkedText, delimiters, spelled_with, translated

# Token types, as GGUF numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Their text is part of an answer and is parsed out of it, whatever type the file gives them.
# fmt: off
TEXT_TOKENS = frozenset((
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
    "<|channel>", "<channel|>", '<|"|>',
))
# fmt: on
LONG_TEXT = 8192  # characters
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Tokenizer:
    """The tokenizer of a file with these `keys`; ModelFileError where they do not describe one."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        model = _key(keys, "model", str)
        if model != "gemma4":
            raise ModelFileError(f"tokenizer.ggml.model is {model!r}: expected 'gemma4'")
        self.tokens: list[str] = _key(keys, "tokens", list)
        self._types: list[int] = _key(keys, "token_type", list)
        _check_all(self.tokens, "tokens", str)
        _check_all(self._types, "token_type", int)
        if len(self._types) != len(self.tokens):
            raise ModelFileError(
                f"tokenizer.ggml.token_type has {len(self._types)} entries, "
                f"but there are {len(self.tokens)} tokens"
            )
        self._ids = {token: id for id, token in enumerate(self.tokens)}
        self._bpe = _bpe(self._ids, _key(keys, "merges", list))
        self._bytes: dict[int, bytes] = {}
        self.bos: int | None = keys.get("tokenizer.ggml.bos_token_id")
        if self.bos is not None and not (
            isinstance(self.bos, int) and 0 <= self.bos < len(self.tokens)
        ):
            raise ModelFileError(f"tokenizer.ggml.bos_token_id {self.bos!r} names no token")
        self.add_bos = self.bos is not None and keys.get("tokenizer.ggml.add_bos_token", True)
        written = self._of_type(USER_DEFINED)
        control = self._of_type(CONTROL)
        self._plain = _any_of(written)
        self._marked = _any_of(written + control)
        own = control_tokens(keys)
        spelled = spelled_with(own, delimiters(own))
        self._template = _any_of(spelled)
        self._text = _any_of([token for token in written if token not in set(own)])

    def _of_type(self, type: int) -> list[str]:
        return [self.tokens[id] for id, its_type in enumerate(self._types) if its_type == type]

    def __len__(self) -> int:
        return len(self.tokens)

    def id(self, token: str) -> int | None:
        """Id of a token by its exact text, or None."""
        return self._ids.get(token)

    def encode(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """Token ids of a text.

        `special`: control tokens such as `<|turn>` are recognised where they are spelled out; in a
        `MarkedText`, as chat templates write them, only where the template wrote them.
        `add_bos`: the begin token stands first, unless the text already begins with it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise OptionValueError(
                f"the text has half a surrogate pair at position {problem.start}: it is no Unicode"
            ) from None
        if special and isinstance(text, MarkedText):
            ids: list[int] = []
            for piece, is_token in _pieces(self._template, text.marked):
                plain = piece if is_token else translated(piece, text.symbols)
                ids += [self._ids[piece]] if is_token else self._encoded(self._text, plain)
        else:
            ids = self._encoded(self._marked if special else self._plain, text)
        if add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def encode_start(self, text: str, n: int) -> list[int]:
        """The first `n` token ids of a text; what they cannot reach is not encoded.

        Control tokens are text.
        """
        return self.encode(text[: (n + 2) * self.max_token_bytes], special=False)[:n]

    def _encoded(self, tokens: re.Pattern[str] | None, text: str) -> list[int]:
        ids: list[int] = []
        for piece, is_token in _pieces(tokens, text):
            if is_token:
                ids.append(self._ids[piece])
            else:
                for part in self._parts(piece):
                    # Unlike `encode`, this lets other threads run.
                    (found,) = self._bpe.encode_batch([part], add_special_tokens=False)
                    ids.extend(found.ids)
        return ids

    def _parts(self, text: str) -> Iterator[str]:
        """A long text, cut where no token could join: encoded one by one, they are the same.

        The library's time and memory grow faster than a text's length.
        """
        if len(text) <= LONG_TEXT:
            yield text
            return
        written, at = text.replace(" ", "▁"), 0
        while at < len(text):
            end = min(at + LONG_TEXT, len(text))
            while end < len(text) and (written[end - 1], written[end]) in self._neighbours:
                end += 1
            yield text[at:end]
            at = end

    @functools.cached_property
    def _neighbours(self) -> frozenset[tuple[str, str]]:
        """Characters that stand side by side in some token: between others none reaches across."""
        return frozenset(pair for token in self.tokens for pair in itertools.pairwise(token))

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """The most bytes of text that a token stands for."""
        return max((len(token.encode()) for token in self.tokens), default=1)

    def token_bytes(self, id: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; nothing for control tokens unless `special`."""
        if not 0 <= id < len(self.tokens):
            raise OptionValueError(f"token id {id} is outside the vocabulary of {len(self.tokens)}")
        token, type = self.tokens[id], self._types[id]
        if type == BYTE and (found := _BYTE.match(token)):
            return bytes([int(found[1], 16)])
        if type in (CONTROL, UNKNOWN, UNUSED) and token not in TEXT_TOKENS:
            return token.encode() if special else b""
        if id not in self._bytes:
            self._bytes[id] = token.replace("▁", " ").encode()
        return self._bytes[id]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(self.token_bytes(int(id), special=special) for id in ids)
        return data.decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        """A decoder that is fed bit by bit."""
        return Decoder(self)


def control_tokens(keys: Mapping[str, Any]) -> list[str]:
    """The tokens of a file that mean something where a chat template writes them.

    These are its control tokens, those that answers are taken apart by, and others of its own that
    are spelled like them or that its template mentions.
    """
    tokens = keys.get("tokenizer.ggml.tokens") or ()
    types = keys.get("tokenizer.ggml.token_type") or ()
    sources = [v for k, v in keys.items() if k.startswith("tokenizer.chat_template")]
    templates = "".join(source for source in sources if isinstance(source, str))
    return [
        token
        for token, type in zip(tokens, types, strict=False)
        if type == CONTROL
        or (type == USER_DEFINED and not token.isspace() and "▁" not in token
            and (token in TEXT_TOKENS or token[:2] == "<|" or token[-2:] == "|>"
                 or token in templates))
    ]  # fmt: skip


class Decoder:
    """Decodes a stream of tokens: a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that this token completes."""
        return self._utf8.decode(self._tokenizer.token_bytes(int(id)))

    def finish(self) -> str:
        """What is left of an unfinished character."""
        return self._utf8.decode(b"", final=True)


def _key(keys: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    value = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
        state = "missing" if value is None else f"a {type(value).__name__}"
        raise ModelFileError(f"tokenizer.ggml.{name} is {state}: expected a {kind.__name__}")
    return value


def _check_all(values: list[Any], name: str, kind: type[Any]) -> None:
    if not {*map(type, values)} <= {kind}:
        raise ModelFileError(f"tokenizer.ggml.{name} has entries that are no {kind.__name__}")


def _bpe(ids: dict[str, int], lines: list[str]) -> tokenizers.Tokenizer:
    _check_all(lines, "merges", str)
    merges = [tuple(line.split(" ")) for line in lines]
    try:
        model = tokenizers.models.BPE(
            ids,
            merges,  # type: ignore[arg-type]  # lengths are checked by the constructor
            byte_fallback=True,
            unk_token="<unk>" if "<unk>" in ids else None,
            fuse_unk=True,
        )
    except Exception as problem:  # the library raises its errors as plain Exception
        told = " ".join(str(problem).split())
        raise ModelFileError(f"tokenizer.ggml.merges do not fit the tokens: {told}") from problem
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    return tokenizer


def _pieces(tokens: re.Pattern[str] | None, text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and of each whether it is one of the tokens."""
    # With one group, re.split alternates between plain text and the tokens found.
    for index, piece in enumerate(tokens.split(text) if tokens else [text]):
        if piece:
            yield piece, index % 2 == 1


def _any_of(tokens: list[str]) -> re.Pattern[str] | None:
    if not tokens:
        return None
    # The longest first: where several fit, the longest one is meant.
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
