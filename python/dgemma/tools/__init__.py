"""From an answer's text to what was thought, said and called."""

from .answer import (
    CALL,
    CALL_END,
    THOUGHT,
    THOUGHT_END,
    AnswerParser,
    Piece,
    ToolCall,
    parse_call,
    split_answer,
)
from .reader import write_call

__all__ = [
    "CALL",
    "CALL_END",
    "THOUGHT",
    "THOUGHT_END",
    "AnswerParser",
    "Piece",
    "ToolCall",
    "parse_call",
    "split_answer",
    "write_call",
]
