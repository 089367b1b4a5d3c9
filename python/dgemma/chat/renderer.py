"""What renders a template out of a model file: it runs in a worker that `sandbox.py` starts."""

from __future__ import annotations

from typing import Any

import jinja2

from ..errors import ChatTemplateError
from ..marks import translated
from .environment import Environment


class Renderer:
    """One template, compiled; the answers are {"text": …} or {"error": …}."""

    def __init__(self) -> None:
        self._environment = Environment()
        self._template: jinja2.Template | None = None

    def compile(self, source: str) -> dict[str, str]:
        """Reads the template."""
        try:
            self._template = self._environment.from_string(source)
        except MemoryError:
            return {"error": "the chat template cannot be read: it needs too much memory"}
        except Exception as problem:  # jinja2's own errors, and those of Python's compiler
            return {"error": f"the chat template cannot be read: {problem}"}
        return {"text": ""}

    def render(self, variables: dict[str, Any], symbols: dict[str, str], max_size: int) -> Any:
        """The text for these variables; `symbols` are their stand-ins."""
        assert self._template is not None
        self._environment.symbols = symbols
        pieces, size = [], 0
        try:
            for piece in self._template.generate(**variables):
                size += len(piece)
                if size > max_size:
                    return {"error": f"the chat template writes more than {max_size} characters; "
                                     "it does not look like a real template"}  # fmt: skip
                pieces.append(piece)
        except ChatTemplateError as problem:
            return {"error": str(problem)}
        except MemoryError:
            pieces.clear()
            return {"error": "the chat template needs too much memory; "
                             "it does not look like a real template"}  # fmt: skip
        except Exception as problem:  # a template can fail in any way that an expression can
            told = translated(str(problem), symbols)[:500]
            return {"error": f"the chat template does not work with these messages: {told}"}
        return {"text": "".join(pieces)}


_RENDERER = Renderer()


def answer(asked: dict[str, Any]) -> Any:
    """Reads the template in "source", or renders it with what else is asked."""
    if "source" in asked:
        return _RENDERER.compile(asked["source"])
    return _RENDERER.render(asked["variables"], asked["symbols"], asked["max_size"])
