"""Who includes and imports whom, and how long files and functions are: read from the sources.

Every function takes the root of a source tree and returns what it found wrong, one line each:
"native/base/a.c includes native/engine/b.h, which stands above it".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# A folder of native/ includes from itself and from those before it.
C_ORDER = ("include", "base", "quant", "gguf", "model", "device", "cpu", "cuda", "engine")

# Likewise for the modules and packages of python/dgemma, which stand in rows: those of one row may
# import each other.
PYTHON_ORDER = (
    ("errors", "machine", "progress", "sizes", "values"),
    ("charts", "files", "tensor_kinds"),
    ("_native",),
    ("gguf_file", "quants"),
    ("importance",),
    ("hub", "marks", "transfer", "workers"),
    ("tokenizer",),
    ("tools",),
    ("chat",),
    ("generation",),
    ("compat", "model"),
    ("opening",),
    ("evaluation",),
    ("server",),
    ("batch",),
    ("ray",),
    ("cli",),
)

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80

_C_SUFFIXES = {".c", ".h", ".cu", ".cuh", ".cpp"}
_SOURCE_SUFFIXES = {*_C_SUFFIXES, ".py", ".js", ".css", ".html"}
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)

Graph = dict[str, set[str]]


def _files(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in suffixes and path.is_file() and "__pycache__" not in path.parts:
            yield path


# ---- C and CUDA ----------------------------------------------------------------------------------


def includes(root: Path) -> Graph:
    """The files of native/ that each file of it includes, as paths from native/."""
    native = root / "native"
    graph: Graph = {}
    for path in _files(native, _C_SUFFIXES):
        found = graph[path.relative_to(native).as_posix()] = set()
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            for base in (native, native / "include", path.parent):
                if (base / name).is_file():
                    found.add((base / name).resolve().relative_to(native.resolve()).as_posix())
                    break
    return graph


def c_arrows_up(root: Path) -> list[str]:
    """Includes of a folder that stands later in C_ORDER, and folders that have no place in it."""
    found = []
    for file, others in sorted(includes(root).items()):
        folder = file.split("/")[0]
        if folder not in C_ORDER:
            found.append(f"native/{folder} has no place in the order {' '.join(C_ORDER)}")
            continue
        for other in sorted(others):
            above = other.split("/")[0]
            if above in C_ORDER and C_ORDER.index(above) > C_ORDER.index(folder):
                found.append(f"native/{file} includes native/{other}, which stands above it")
    return found


def c_circles(root: Path) -> list[str]:
    """Circles of files of native/; a header and the source beside it are one thing."""

    def unit(file: str) -> str:
        return file.rsplit(".", 1)[0]

    graph: Graph = {}
    for file, others in includes(root).items():
        graph.setdefault(unit(file), set()).update(unit(o) for o in others if unit(o) != unit(file))
    return circles(graph)


# ---- Python --------------------------------------------------------------------------------------


def _module_of(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: Path) -> Graph:
    """The modules that each module below `source` imports, by full names.

    Imports inside functions and below TYPE_CHECKING count: who names another must know it.
    """
    modules = {_module_of(path, source): path for path in _files(source, {".py"})}
    graph: Graph = {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found: set[str] = set()
        graph[module] = found
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parents, *([base] if base else [])])
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    # `from package import module` names the module; of foreign ones, who knows.
                    foreign = base.split(".")[0] not in {m.split(".")[0] for m in modules}
                    found.add(full if foreign or full in modules else base)
        found.discard(module)
    return graph


def _row(module: str) -> int | None:
    name = [*module.split("."), ""][1]
    for row, names in enumerate(PYTHON_ORDER):
        if name in names:
            return row
    return None


def python_arrows_up(root: Path) -> list[str]:
    """Imports within python/dgemma of what stands in a later row, and modules without a place."""
    found = []
    for module, others in sorted(imports(root / "python").items()):
        if not module.startswith("dgemma."):
            continue
        row = _row(module)
        if row is None:
            found.append(f"{module} has no place in PYTHON_ORDER (tests/support/layers.py)")
            continue
        for other in sorted(others):
            above = _row(other) if other.startswith("dgemma.") else None
            if above is not None and above > row:
                found.append(f"{module} imports {other}, which stands above it")
    return found


def python_circles(root: Path) -> list[str]:
    """Circles of modules, in python/ and in convert/; a package's __init__ is its shop window."""
    found = []
    for folder in ("python", "convert"):
        graph = imports(root / folder)
        found += circles({m: {o for o in others if o in graph} for m, others in graph.items()})
    return found


def package_arrows(root: Path) -> list[str]:
    """convert/ uses public modules of dgemma only; python/ does not know convert/."""
    found = []
    for module, others in sorted(imports(root / "convert").items()):
        for other in sorted(others):
            parts = other.split(".")
            if parts[0] == "dgemma" and any(part.startswith("_") for part in parts):
                found.append(f"{module} imports {other}, which is not public")
    for module, others in sorted(imports(root / "python").items()):
        if any(other.split(".")[0] == "dgemma_convert" for other in others):
            found.append(f"{module} imports dgemma_convert, which stands above dgemma")
    return found


# ---- Both ----------------------------------------------------------------------------------------


def circles(graph: Graph) -> list[str]:
    """The strongly connected parts of a graph that have more than one node, each as one line."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str, edges: Graph, out: list[str]) -> None:
        stack = [(start, iter(sorted(edges.get(start, ()))))]
        seen.add(start)
        while stack:
            node, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                out.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(sorted(edges.get(following, ())))))

    for node in sorted(graph):
        if node not in seen:
            visit(node, graph, order)
    turned: Graph = {}
    for node, others in graph.items():
        for other in others:
            turned.setdefault(other, set()).add(node)
    seen.clear()
    found = []
    for node in reversed(order):
        if node not in seen:
            part: list[str] = []
            visit(node, turned, part)
            if len(part) > 1:
                found.append("circle: " + " ".join(sorted(part)))
    return sorted(found)


def _c_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and length of each function that begins in the first column (clang-format's layout)."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        start = at
        if re.match(r"[A-Za-z_]", lines[at]) and not re.match(r"(namespace|extern \")", lines[at]):
            while at < len(lines) and not re.search(r"[{};:]$", lines[at]):
                at += 1
            head = re.sub(
                r"(__launch_bounds__|__attribute__|alignas)\(\(?[^)]*\)",
                "",
                " ".join(lines[start : at + 1]),
            )
            name = re.search(r"(\w+)\s*\(", head)
            if name and re.search(r"\)[\w\s]*\{$", head) and "=" not in head.split("(")[0]:
                while at < len(lines) and lines[at] != "}":
                    at += 1
                yield name[1], at - start + 1
        at += 1


def too_long(
    root: Path,
    folders: Iterable[str] = (
        "native",
        "python",
        "convert",
        "tests",
        "bench",
        "examples",
        "models",
    ),
) -> list[str]:
    """Files and functions over the limits, as "path" and "path: name"; sizes are left out."""
    found = []
    for folder in folders:
        for path in _files(root / folder, _SOURCE_SUFFIXES):
            name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
            if len(text.splitlines()) > MAX_FILE_LINES:
                found.append(name)
            if path.suffix == ".py":
                functions = [
                    (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
                    for node in ast.walk(ast.parse(text))
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                ]
            else:
                functions = list(_c_functions(text)) if path.suffix in _C_SUFFIXES else []
            found += [f"{name}: {f}" for f, n in functions if n > MAX_FUNCTION_LINES]
    return found
