"""What one request or one file could use to end, freeze or bloat the process."""

# ruff: noqa: E501, PT017, UP031  # a table reads better in its lines; an error is one of two right results

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

import dgemma
from dgemma.chat import sandbox
from dgemma.chat.sandbox import Template
from dgemma.generation import grammars
from dgemma.generation.structured import call_form, json_form

# ---- Schemas -------------------------------------------------------------------------------------


def chain(n: int, link: Any) -> dict[str, Any]:
    """Definitions of which each refers to the next one; `link` makes the step."""
    steps = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{n}": {"type": "integer"}}}


LINKS: dict[str, Any] = {
    "alone": lambda ref: ref,
    "items": lambda ref: {"type": "array", "items": ref},
    "allOf": lambda ref: {"allOf": [ref]},
    "anyOf": lambda ref: {"anyOf": [ref, {"type": "null"}]},
    "oneOf": lambda ref: {"oneOf": [ref]},
    "properties": lambda ref: {"type": "object", "properties": {"a": ref}, "required": ["a"]},
    "additionalProperties": lambda ref: {"type": "object", "additionalProperties": ref},
    "prefixItems": lambda ref: {"type": "array", "prefixItems": [ref]},
    "not": lambda ref: {"not": ref},
}


def wanted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


@pytest.mark.parametrize("n", [1_200, 2_800, 20_000])
@pytest.mark.parametrize("link", LINKS)
def test_chains_of_references_are_bounded(link: str, n: int) -> None:
    """On a thread with the smallest of stacks, as a server's may be."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(json_form(wanted(chain(n, LINKS[link]))))
        except dgemma.OptionError as problem:
            found.append(problem.param)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found[0] == "response_format" or found[0][0] is not None


@pytest.mark.parametrize("link", LINKS)
def test_chains_of_ordinary_length_are_made_or_refused_with_a_reason(link: str) -> None:
    try:
        form, _ = json_form(wanted(chain(100, LINKS[link])))
    except dgemma.OptionError as problem:
        assert "cannot be checked" in str(problem)
    else:
        assert form is not None


def nested(n: int, key: str = "items") -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(n):
        schema = {key: [schema] if key in ("allOf", "anyOf", "oneOf") else schema}
    return schema


@pytest.mark.parametrize("n", [60, 500, 5_000, 100_000])
@pytest.mark.parametrize("key", ["items", "allOf", "anyOf", "oneOf", "not", "$defs"])
def test_nesting_is_bounded(key: str, n: int) -> None:
    if n == 60:
        n = 40  # two levels a step
    try:
        json_form(wanted(nested(n, key)))
    except dgemma.OptionError as problem:
        assert problem.param == "response_format"
    else:
        assert n == 40


@pytest.mark.parametrize("required", [[["a"]], [{"a": 1}], [None], "a", {"a": 1}, [1, "a"]])
def test_odd_names_of_what_is_required_are_left_out(required: Any) -> None:
    schema = {"type": "object", "properties": {"a": {}}, "required": required}
    assert call_form([{"function": {"name": "f", "parameters": schema}}], named=True)


ODD_SCHEMAS: dict[str, Any] = {
    "a deep expression": {"type": "string", "pattern": "(" * 500 + "a" + ")" * 500},
    "a deeper expression": {"type": "string", "pattern": "(" * 100_000 + "a" + ")" * 100_000},
    "a large expression": {"type": "string", "pattern": "(((a{1000}){1000}){1000}){1000}"},
    "no expression": {"type": "string", "pattern": "("},
    "a large number": {"type": "integer", "maximum": 10**4000},
    "a larger number": {"type": "integer", "minimum": 10**5000},
    "an infinite number": {"type": "number", "maximum": float("inf")},
    "a type that is none": {"type": "nothing"},
    "a type that is a number": {"type": 5},
    "a reference to itself": {"$ref": "#"},
    "two references in a circle": {"$ref": "#/$defs/a",
                                   "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "a reference to nothing": {"$ref": "#/$defs/none"},
    "a reference outside": {"$ref": "https://example.com/schema"},
    "properties that are a list": {"properties": [1]},
    "required that is a number": {"required": 7},
    "no values": {"enum": []},
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a long text": {"type": "string", "minLength": 10**9},
    "contradictions": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "a product of choices": {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"const": j}}}
                                                  for j in range(8)]} for i in range(8)]},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_SCHEMAS)
def test_odd_schemas_are_made_or_refused(name: str) -> None:
    try:
        form, _ = json_form(wanted(ODD_SCHEMAS[name]))
    except dgemma.OptionError as problem:
        assert problem.param == "response_format"
    else:
        assert form is not None


def test_a_schema_that_refers_to_itself_is_ordinary() -> None:
    tree = {"$defs": {"node": {"type": "object", "properties": {
        "value": {"type": "integer"},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
    }}}, "$ref": "#/$defs/node"}  # fmt: skip
    form, _ = json_form(wanted(tree))
    assert form is not None


def test_many_definitions_are_ordinary() -> None:
    defs = {
        f"d{i}": {"type": "object", "properties": {"a": {"type": "string"}}} for i in range(600)
    }
    properties = {f"p{i}": {"$ref": f"#/$defs/d{i}"} for i in range(600)}
    form, _ = json_form(wanted({"type": "object", "properties": properties, "$defs": defs}))
    assert form is not None


def test_what_ends_the_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds switched off, the library fails in the worker alone; this process stays, and goes on."""
    monkeypatch.setattr(grammars, "check_depth", lambda *_: None)
    monkeypatch.setattr(grammars, "MAX_GRAMMAR", 2**24)
    with pytest.raises(dgemma.OptionError, match="making its grammar failed") as caught:
        json_form(wanted(chain(40_000, LINKS["properties"])))
    assert caught.value.param == "response_format"
    monkeypatch.undo()
    assert json_form(wanted({"type": "boolean"}))[0] is not None
    assert call_form(["f"], named=True)


# ---- Templates -----------------------------------------------------------------------------------

BLOWN_UP = {
    **{f"arithmetic {e}": "{{ %s }}" % e for e in (
        "7 ** 10**9", "(7 ** 10**6) ** 999", "3 ** 3 ** 3 ** 3", "(10 ** 10**8) // 7",
        "(10 ** 10**8) % 7", "(9 ** 10**7) * (9 ** 10**7)", "(10 ** 10**7) | round", "2.0 ** 99999",
        "(10 ** 10**7) | string | length", "(1 | int) // 0", "-(9 ** 10**9)", "10**9 * [1]",
    )},
    **{f"a text {e}": "{{ %s | length }}" % e for e in (
        "('\\t' * 10**6).expandtabs(10**6)", "('a' * 10**7).translate({97: 'b' * 10**6})",
        "'{:>9999999999}'.format(1)", "'{:{w}}'.format(1, w=10**10)", "'%*d' % (10**10, 1)",
        "'%9999999999d' % 1", "'%(a)9999999999d' % {'a': 1}", "'a'.ljust(10**11)", "'a'.zfill(10**11)",
        "'a'.center(10**11)", "('a' * 10**9).replace('a', 'aa')", "'a' * 10**10", "'ab'.join(['c' * 10**8] * 99)",
        "('a,' * 10**9).split(',')", "'a' | indent(10**11, true)", "('a\n' * 10**6) | indent(10**5)",
        "('a' * 10**8) | upper | list", "('a' * 10**8) | title | batch(1) | list",
        "range(10**6) | list | tojson(indent=10**6)", "'a'.encode() * 10**11", "('é' * 10**9).encode()",
        "('a' * 10**6) | wordwrap(1)", "('a ' * 10**8) | wordcount", "('x' * 10**9) | urlize",
        "'a' | center(10**11)", "('a' * 10**9) | reverse", "('b' * 10**9) | replace('b', 'ccc')",
        "lipsum(n=10**7)", "[1] * 10**10", "range(10**6) | map('string') | join('x' * 10**6)",
    )},
    **{f"a loop in {name}": body % "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
       for name, body in {
        "a set block": "{%% set x %%}%s{%% endset %%}", "a filter block": "{%% filter upper %%}%s{%% endfilter %%}",
        "a macro": "{%% macro f() %%}%s{%% endmacro %%}{{ f() }}",
        "a call block": "{%% macro f() %%}{{ caller() }}{%% endmacro %%}{%% call f() %%}%s{%% endcall %%}",
        "a condition": "{%% if true %%}%s{%% endif %%}", "a block": "{%% block b %%}%s{%% endblock %%}",
        "a with": "{%% with a = 1 %%}%s{%% endwith %%}", "a generation": "{%% generation %%}%s{%% endgeneration %%}",
       }.items()},
    **{f"growth by {op}": "{%% set n = namespace(x='ab') %%}{%% for i in range(60) %%}{%% set n.x = %s %%}{%% endfor %%}"
       "{{ n.x | length }}" % op for op in (
        "n.x ~ n.x", "n.x + n.x", "n.x * 2", "n.x.replace('a', n.x)", "n.x | replace('b', n.x)", "'%s%s' % (n.x, n.x)",
        "'{0}{0}'.format(n.x)", "[n.x, n.x] | join", "n.x.join([n.x, n.x, n.x])", "[n.x, n.x] | string", "(n.x, n.x) | tojson",
    )},
    "recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursive loops": "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "a generator": "{{ range(99999) | map('string') | map('list') | sum(start=[]) | length }}",
    "sums": "{% for i in range(9999) %}{{ range(99999) | sum }}{% endfor %}",
    "sorting": "{% for i in range(9999) %}{{ range(99999) | sort(reverse=true) | length }}{% endfor %}",
    "much output": "{% for i in range(99999) %}{% for j in range(999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "a long number": "{{ 1" + "0" * 5000 + " }}",
    "Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a module": "{{ strftime_now.__globals__ }}",
    "a frame": "{% set g = range(1) | map('string') %}{{ g.gi_frame.f_builtins }}",
    "deep parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "many conditions": "{% if a %}" * 5000,
    "many loops": "{% for i in range(9) %}" * 25 + "{% endfor %}" * 25,
}  # fmt: skip


@pytest.mark.parametrize("name", BLOWN_UP)
def test_templates_that_blow_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error or a text, and the next template is rendered as if nothing had been."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 2.0)
    try:
        text = Template(BLOWN_UP[name]).render({"messages": []})
    except dgemma.ChatTemplateError as problem:
        assert str(problem).startswith("the chat template ")
    else:
        assert len(text) <= sandbox.MAX_SIZE


def test_memory_of_the_worker_is_bounded() -> None:
    template = Template("{{ ('a' * n) | length }}")
    assert template.render(n=10**7) == str(10**7)
    with pytest.raises(dgemma.ChatTemplateError, match="too much memory"):
        template.render(n=sandbox.MAX_BYTES)
    assert template.render(n=3) == "3"


def test_a_worker_that_was_killed_is_replaced() -> None:
    template = Template("{{ x }}")
    assert template.render(x=1) == "1"
    for worker in (template._worker, None):
        if worker is not None:
            os.kill(worker._process.pid, 9)  # type: ignore[union-attr]
            worker._process.wait()  # type: ignore[union-attr]
        assert template.render(x=2) == "2"


def test_workers_end_with_what_they_are_for() -> None:
    template = Template("{{ x }}")
    process = template._worker._process  # type: ignore[union-attr]
    del template
    gc.collect()
    assert process.poll() is not None


def test_a_forked_process_has_a_worker_of_its_own() -> None:
    template = Template("{{ x }}")
    assert template.render(x="parent") == "parent"
    child = os.fork()
    if child == 0:
        os._exit(0 if template.render(x="child") == "child" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert template.render(x="parent") == "parent"


def test_a_worker_sees_nothing_of_its_program() -> None:
    """It neither inherits variables nor outlives the program, whatever it is doing."""
    program = (
        "import os, sys, threading, time\n"
        "os.environ['SECRET'] = 'x'\n"
        "from dgemma.chat.sandbox import Template\n"
        "t = Template('{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}')\n"
        "pid = t._worker._process.pid\n"
        "print(pid, b'SECRET' in open(f'/proc/{pid}/environ', 'rb').read(), flush=True)\n"
        "threading.Thread(target=lambda: t.render(n=99999), daemon=True).start()\n"
        "time.sleep(0.2)\n"
    )
    if not os.path.isdir("/proc"):
        pytest.skip("needs /proc")
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    pid, secret = ran.stdout.split()
    assert secret == "False"
    assert not os.path.exists(f"/proc/{pid}")


def test_without_workers_templates_are_rendered_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    template = Template("{{ x | tojson }}", ["<|turn>"])
    prompt = template.render({"x": "<|turn>"})
    assert (prompt, prompt.count("<"), prompt.marked.count("<")) == ('"<|turn>"', 1, 0)
    with pytest.raises(dgemma.ChatTemplateError, match="cannot be read"):
        Template("{% if %}")
    assert json.loads(prompt) == "<|turn>"
