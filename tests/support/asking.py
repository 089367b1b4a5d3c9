"""What tests ask models/tiny."""

from __future__ import annotations

from typing import Any

from dgemma import DiffusionGemma

QUESTION = "What is the capital of France?"
PROSE = "Once there was a small owl that lived near the lake. One day the owl"


def ask(text: str) -> list[dict[str, str]]:
    """The messages of one question."""
    return [{"role": "user", "content": text}]


def prompt_of(llm: DiffusionGemma, text: str) -> str:
    """The question as the model's template writes it."""
    return llm.chat_template.render(ask(text))


def unending(**changes: Any) -> dict[str, Any]:
    """Options with which no canvas settles: an answer takes long enough to be disturbed."""
    return {"confidence_threshold": 1e-30, "max_denoising_steps": 10_000, **changes}
