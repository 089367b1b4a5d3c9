"""What completions need of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..chat.template import ChatTemplate
    from ..generation.choices import Choices
    from ..tokenizer import Tokenizer
    from ..values import Ids, ModelInfo


class Host(Protocol):
    """A loaded model; `DiffusionGemma` is one."""

    model_path: str
    info: ModelInfo

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer."""

    @property
    def chat_template(self) -> ChatTemplate:
        """The file's chat template."""

    def choices(self, prompts: Sequence[str | Ids], *, n: int = 1, **options: Any) -> Choices:
        """`n` answers to each of several prompts."""
