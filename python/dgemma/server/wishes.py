"""Forms of answers and thinking, as the servers of others have them asked for.

What can be done is done, whatever its name. A form that cannot is refused: an answer without it
would be taken for what it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .engine import JsonObject
from .failures import BadRequestError

_NO_THINKING = ("none", "minimal", "off")
# A JSON schema: llama.cpp's, vLLM's older and Ollama's field.
_SCHEMAS = ("json_schema", "guided_json", "format")
_OTHER_FORMS = (
    *("guided_regex", "guided_choice", "guided_grammar", "grammar_string", "regex", "ebnf"),
    *("structural_tag", "grammar_lazy"),
)


def asked_form(fields: dict[str, Any]) -> Any:
    """The `response_format` that the fields ask for, in one form; takes its other names out."""
    for name in _OTHER_FORMS:
        if fields.pop(name, None):
            raise _refused(name)
    found: Any = fields.pop("response_format", None)
    for name in _SCHEMAS:
        value = fields.pop(name, None)
        if found is None and value is not None and value != "":
            found = _of_schema(name, value)
    outputs = fields.pop("structured_outputs", None)  # vLLM's
    if isinstance(outputs, Mapping) and found is None:
        for name, value in outputs.items():
            if name == "json" and value is not None:
                found = _of_schema("structured_outputs.json", value)
            elif name == "json_object" and value:
                found = {"type": "json_object"}
            elif value and not isinstance(value, bool):
                raise _refused(f"structured_outputs.{name}")
    if isinstance(found, str) and found in ("text", "json_object"):
        return {"type": found}
    if not isinstance(found, Mapping):
        return found
    return _plain(found)


def _plain(form: Mapping[str, Any]) -> JsonObject | None:
    """A `response_format` as OpenAI has it; an empty one asks for nothing."""
    if not form:
        return None
    if form.get("type") == "json_schema" and "json_schema" not in form and "schema" in form:
        return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}  # llama.cpp's
    if form.get("type") == "json":  # Hugging Face's
        return _of_schema("response_format", form.get("value", form.get("schema", {})))
    return dict(form)


def _of_schema(name: str, value: Any) -> JsonObject:
    if isinstance(value, str):
        if value == "json":
            return {"type": "json_object"}
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRequestError(
                f"{name} must be a JSON schema", param=name, code="invalid_value"
            ) from None
    if isinstance(value, Mapping) and isinstance(value.get("schema"), Mapping):
        value = value["schema"]
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}


def _refused(name: str) -> BadRequestError:
    return BadRequestError(
        f"{name} is not supported: ask for JSON with `response_format`, which is checked and "
        "repaired; an `enum` in its schema is a choice of texts",
        param=name,
        code="unsupported_parameter",
    )


def asked_to_think(fields: dict[str, Any]) -> bool | None:
    """Whether the fields ask for thoughts; None where they do not say. Takes them out."""
    effort = fields.pop("reasoning_effort", None)
    reasoning = fields.pop("reasoning", None)  # OpenRouter's, and that of the responses API
    if isinstance(reasoning, Mapping):
        effort = reasoning.get("effort") if effort is None else effort
        if effort is None and isinstance(reasoning.get("enabled"), bool):
            return bool(reasoning["enabled"])
    if effort is not None:
        return effort not in _NO_THINKING
    think = fields.pop("think", None)  # Ollama's
    if isinstance(think, bool | str):
        return bool(think not in (False, "false", *_NO_THINKING))
    thinking = fields.pop("thinking", None)  # DeepSeek's
    if isinstance(thinking, Mapping) and isinstance(thinking.get("type"), str):
        return bool(thinking["type"] != "disabled")
    if fields.get("reasoning_budget") == 0:  # llama.cpp's
        del fields["reasoning_budget"]
        return False
    return None
