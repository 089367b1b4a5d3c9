"""What `llama_cpp.Llama` takes: names, order and defaults, read from its source without running it.

    python tests/support/llama_signatures.py llama_cpp_python-0.3.36/llama_cpp/llama.py 0.3.36 \
        >tests/python/llama_cpp_signatures.json
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

# Constants of llama.cpp that stand as defaults.
_CONSTANTS = {
    "LLAMA_SPLIT_MODE_LAYER": 1,
    "LLAMA_DEFAULT_SEED": 0xFFFFFFFF,
    "LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED": -1,
    "LLAMA_POOLING_TYPE_UNSPECIFIED": -1,
    "LLAMA_ATTENTION_TYPE_UNSPECIFIED": -1,
}


def signatures(source: str) -> dict[str, Any]:
    """The public methods of the class, each as [name, default] pairs; no default: "required"."""
    (llama,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Llama"
    )
    return {
        method.name: _parameters(method)
        for method in llama.body
        if isinstance(method, ast.FunctionDef)
        and (not method.name.startswith("_") or method.name in ("__init__", "__call__"))
        and not any("property" in ast.unparse(each) for each in method.decorator_list)
    }


def _parameters(method: ast.FunctionDef) -> dict[str, Any]:
    given = method.args
    names = [each.arg for each in given.args if each.arg not in ("self", "cls")]
    n_required = len(names) - len(given.defaults)
    positional = [
        [name, "required" if i < n_required else _default(given.defaults[i - n_required])]
        for i, name in enumerate(names)
    ]
    keyword = [
        [each.arg, "required" if default is None else _default(default)]
        for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    return {"positional": positional, "keyword": keyword}


def _default(node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute):
        return _CONSTANTS[node.attr]
    return ast.literal_eval(node)


if __name__ == "__main__":
    found = signatures(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
    print(f'{{"version": {json.dumps(sys.argv[2])}, "methods": {{')
    print(",\n".join(lines) + "\n}}")
