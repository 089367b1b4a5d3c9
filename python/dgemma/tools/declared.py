"""Tools as requests declare them, and which of them a choice leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionTypeError, OptionValueError

# Others than OpenAI's letters and digits are in use; what would end a name in a call is not.
_NAME = re.compile(r"[\w$@/.:-]{1,256}")
_WORDS = {None: "auto", "any": "required"}


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools, each as {"type": "function", "function": {"name", "description", "parameters"}}.

    Errors: OptionTypeError and OptionValueError, with the place in `param`.
    """
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise OptionTypeError("tools must be a list", param="tools")
    return [_checked(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _checked(tool: Any, place: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if isinstance(tool, Mapping) and function is None and "name" in tool:
        function = {name: value for name, value in tool.items() if name != "type"}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise OptionTypeError(
            f"{place}: each tool must be {{'type': 'function', 'function': {{'name': …}}}}",
            param=f"{place}.function.name",
        )
    if not _NAME.fullmatch(function["name"]):
        raise OptionValueError(
            f"{place}: {function['name']!r} is no name for a tool: letters, digits and _ - . : / "
            "are allowed",
            param=f"{place}.function.name",
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise OptionTypeError(
            f"{place}: parameters must be a JSON schema", param=f"{place}.function.parameters"
        )
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": {"description": "", "parameters": {}, **given}}


def chosen_tools(tools: Any, choice: Any) -> tuple[str, list[str]]:
    """What a `tool_choice` asks for: "none", "auto" or "required", and of which tools, by name.

    Errors: as `checked_tools`; also where the choice names a tool that is not there.
    """
    names = [tool["function"]["name"] for tool in checked_tools(tools)]
    mode, wanted = _asked(choice)
    if wanted is not None:
        for name in wanted:
            if name not in names:
                known = ", ".join(names) or "there are none"
                raise OptionValueError(
                    f"tool_choice {name!r} is none of the tools: {known}", param="tool_choice"
                )
        names = wanted
    if mode == "required" and not names:
        raise OptionValueError(
            "tool_choice asks for a call, but there are no tools", param="tool_choice"
        )
    return mode, names


def _asked(choice: Any) -> tuple[str, list[str] | None]:
    if choice is None or isinstance(choice, str):
        mode = _WORDS.get(choice, choice)
        if mode in ("none", "auto", "required"):
            return str(mode), None
        return "required", [str(choice)]  # a name alone, as some clients send it
    if isinstance(choice, Mapping):
        if choice.get("type") == "allowed_tools":
            given = choice.get("allowed_tools", choice)
            if isinstance(given, Mapping) and isinstance(given.get("tools"), list):
                mode, _ = _asked(given.get("mode"))
                return mode, [_name_of(tool) for tool in given["tools"]]
        elif choice.get("type") in ("none", "auto", "required", "any"):
            return _asked(choice["type"])
        else:
            return "required", [_name_of(choice)]
    raise _odd(choice)


def _name_of(choice: Any) -> str:
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise _odd(choice)
    return name


def _odd(choice: Any) -> OptionTypeError:
    told = repr(choice)
    return OptionTypeError(
        f"tool_choice is {told[:100]}: expected 'auto', 'none', 'required' or "
        "{'type': 'function', 'function': {'name': …}}",
        param="tool_choice",
    )
