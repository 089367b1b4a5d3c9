"""How good a file is: divergence, accuracy, steps; and what an importance matrix is made of."""

from .evaluate import (
    LEVELS,
    Case,
    Comparison,
    Predictions,
    Question,
    answer_cases,
    ask,
    log_softmax,
    noisy_canvases,
    predictions,
    read_questions,
    summarize,
    text_cases,
)

__all__ = [
    "LEVELS",
    "Case",
    "Comparison",
    "Predictions",
    "Question",
    "answer_cases",
    "ask",
    "log_softmax",
    "noisy_canvases",
    "predictions",
    "read_questions",
    "summarize",
    "text_cases",
]
