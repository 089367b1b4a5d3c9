"""Chat templates that want all time and memory there is, or out of their box.

    python tests/fuzz/hostile_templates.py [--cases 0] [--seconds 1]

Every expression of EXPRESSIONS stands in every place of PLACES. Prints how they ended, the longest
time that one took, and the most memory that a worker had. An error or a text, within its time and
memory, is right.
"""

# ruff: noqa: E501  # a table reads better in its lines

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections import Counter

import dgemma
from dgemma.chat import sandbox
from dgemma.chat.sandbox import Template

EXPRESSIONS = (
    "7 ** 10**9", "(9 ** 10**7) * (9 ** 10**7)", "(10 ** 10**8) // 7", "(10 ** 10**8) % 7", "(10 ** 10**7) | round",
    "('\\t' * 10**6).expandtabs(10**6)", "('a' * 10**7).translate({97: 'b' * 10**6})", "'{:>9999999999}'.format(1)",
    "'%9999999999d' % 1", "'%(a)9999999999d' % {'a': 1}", "'a' | indent(10**11, true)", "range(10**6) | list | tojson(indent=10**6)",
    "'a'.encode() * 10**11", "[1] * 10**10", "range(99999) | map('string') | map('list') | sum(start=[]) | length",
    "lipsum(n=10**7)", "('a,' * 10**9).split(',') | length", "('x' * 10**8) | urlize | length",
    "('a' * 10**6) | wordwrap(1) | length", "''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__",
    "range.__self__", "messages.__class__.__base__", "1" + "0" * 6000,
)  # fmt: skip
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% if i == j %}{% endif %}{% endfor %}{% endfor %}"
PLACES = {
    "plain": "{{ %s }}",
    "a variable": "{%% set x = %s %%}{{ x | string | length }}",
    "a set block": "{%% set x %%}{{ %s }}{%% endset %%}{{ x | length }}",
    "a filter block": "{%% filter upper %%}{{ %s }}{%% endfilter %%}",
    "a macro": "{%% macro f() %%}{{ %s }}{%% endmacro %%}{{ f() }}{{ f() }}",
    "a call": "{%% macro f() %%}{{ caller() }}{%% endmacro %%}{%% call f() %%}{{ %s }}{%% endcall %%}",
    "a loop": "{%% for i in range(3) %%}{{ (%s) | string | length }}{%% endfor %%}",
}
OTHERS = (
    LOOP, "{% set x %}" + LOOP + "{% endset %}", "{% filter upper %}" + LOOP + "{% endfilter %}",
    "{% macro f() %}" + LOOP + "{% endmacro %}{{ f() }}", "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}", "{% if a %}" * 5000, "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{% for i in range(9) %}" * 25 + "{% endfor %}" * 25, "{{ 'x' * 10 }}" * 200_000, "{% include 'x' %}", "{% import 'x' as x %}",
    "{% extends '/etc/passwd' %}", "{# " + "x" * 10**7 + " #}", "{% raw %}" + "{{" * 10**6, "{{ raise_exception('no') }}", "{{ strftime_now('%' * 10**6) }}",
)  # fmt: skip


def cases(n: int) -> list[tuple[str, str]]:
    """Names and sources; `n` of them, 0 for all."""
    made = [
        (f"{expression[:60]} in {place}", source % expression)
        for expression in EXPRESSIONS
        for place, source in PLACES.items()
    ]
    made += [(source[:60], source) for source in OTHERS]
    return random.Random(1).sample(made, n) if n else made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1, help="that a template may take")
    args = parser.parse_args()
    sandbox.MAX_SECONDS = args.seconds
    ended: Counter[str] = Counter()
    faults, slowest = [], (0.0, "")
    tried = cases(args.cases)
    for name, source in tried:
        began = time.monotonic()
        try:
            text = Template(source).render({"messages": [{"role": "user", "content": "Hi"}]})
        except dgemma.ChatTemplateError as problem:
            told = str(problem)
            ended[
                "late" if "longer than" in told else "memory" if "memory" in told else "refused"
            ] += 1
        except BaseException as problem:
            faults.append(f"{name}: {problem!r:.300}")
        else:
            ended["a text"] += 1
            if len(text) > sandbox.MAX_SIZE:
                faults.append(f"{name}: {len(text)} characters")
            if "subclasses" in source or "__globals__" in source:
                faults.append(f"{name}: out of its box: {text[:100]}")
        slowest = max(slowest, (time.monotonic() - began, name))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    if peak * 1e6 > sandbox.MAX_BYTES:
        faults.append(f"a worker had {peak:.0f} MB")
    print(f"{len(tried)} templates: {dict(sorted(ended.items()))}, {len(faults)} faults")
    print(
        f"the slowest took {slowest[0]:.1f} s ({slowest[1]}); the largest worker had {peak:.0f} MB"
    )
    for fault in faults[:20]:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
