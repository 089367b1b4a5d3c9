"""Conversations as the model reads them: messages in the OpenAI form become one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from ..errors import ChatTemplateError, ModelFileError
from ..marks import MarkedText
from ..tokenizer import control_tokens
from ..tools.declared import checked_tools
from .messages import Message, normalized, prefilled
from .sandbox import Template


class ChatTemplate:
    """The chat template of a file with these `keys`, or Gemma 4's where it has none.

    A file may have others by name: `tool_use` is for conversations with tools, `rag` for documents.
    """

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self._tokens = control_tokens(keys)
        self._plain = self._template(keys, "tokenizer.chat_template") or Template(
            resources.files(__package__).joinpath("gemma4.jinja").read_text("utf-8"), self._tokens
        )
        self._tools = self._template(keys, "tokenizer.chat_template.tool_use") or self._plain
        self._documents = self._template(keys, "tokenizer.chat_template.rag") or self._plain
        tokens = keys.get("tokenizer.ggml.tokens")
        self._variables = {
            f"{name}_token": tokens[id] if tokens and 0 <= id < len(tokens) else ""
            for name in ("bos", "eos")
            for id in [keys.get(f"tokenizer.ggml.{name}_token_id", -1)]
        }

    def _template(self, keys: Mapping[str, Any], name: str) -> Template | None:
        source = keys.get(name)
        if source is not None and not isinstance(source, str):
            raise ModelFileError(f"{name} is a {type(source).__name__}: expected a text")
        return Template(source, self._tokens) if source else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> MarkedText:
        """The prompt for these messages, begin token included.

        It reads as a text, and knows which control tokens the template wrote: those that messages,
        tools and documents spell out are encoded as ordinary text (see `Tokenizer.encode`).

        Where the last message is the assistant's, its answer is begun and not ended: the model goes
        on behind it.

        Errors: TypeError and ValueError where a message is malformed, ChatTemplateError where the
        template cannot express them.
        """
        template = self._tools if tools else self._documents if documents else self._plain
        begun = ""
        if add_generation_prompt:
            found, begun = prefilled(messages)
        else:
            found = normalized(messages)
        prompt = template.render(
            {
                "messages": found,
                "tools": checked_tools(tools) or None,
                **({"documents": documents} if documents else {}),
            },
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
        return prompt + template.text(begun) if begun else prompt


def check_template(source: str, **keys: Any) -> None:
    """Raises ChatTemplateError where a template cannot be read, or cannot say the simplest thing.

    `keys`: metadata of the file that it is for, such as `tokenizer.ggml.tokens`.
    """
    template = ChatTemplate({**keys, "tokenizer.chat_template": source})
    greeting = [{"role": "user", "content": "Hi"}]
    if "Hi" not in template.render(greeting):
        raise ChatTemplateError("the chat template does not write what the user says")
