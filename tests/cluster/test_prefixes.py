"""Which replica a request is sent to; no cluster runs here."""

from __future__ import annotations

import json
from typing import Any

from dgemma.ray.prefixes import TEXT_PIECE, PrefixMap, RoutingState, prefix_keys


def keys(*messages: tuple[str, str], **fields: Any) -> list[str]:
    listed = [{"role": role, "content": content} for role, content in messages]
    return prefix_keys(json.dumps({"messages": listed, **fields}).encode())


SYSTEM, HELLO, REPLY, MORE = (
    ("system", "Be brief."),
    ("user", "Hello"),
    ("assistant", "Hi"),
    ("user", "More"),
)


def test_a_conversation_keeps_its_keys_as_it_grows() -> None:
    first, second = keys(SYSTEM, HELLO), keys(SYSTEM, HELLO, REPLY, MORE)
    assert len(first) == 1
    assert len(second) == 3
    assert second[:1] == first


def test_what_applications_share_is_no_conversation() -> None:
    assert keys(SYSTEM) == []
    assert keys(SYSTEM, HELLO) != keys(HELLO)
    assert keys(HELLO, tools=[{"type": "function"}]) != keys(HELLO)
    assert keys(HELLO, temperature=0.5) == keys(HELLO)


def test_plain_prompts_by_pieces() -> None:
    text = "x" * (2 * TEXT_PIECE + 10)
    long, short = (prefix_keys(json.dumps({"prompt": p}).encode()) for p in (text, text[:-20]))
    assert len(long) == 2
    assert short == long[:1]
    assert prefix_keys(json.dumps({"prompt": [1, 2, 3]}).encode()) == []


def test_bodies_that_are_no_requests() -> None:
    for body in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 200_000):
        assert prefix_keys(body) == []


def test_longest_prefix_wins_and_the_dead_are_passed_over() -> None:
    known = PrefixMap()
    known.remember(["a", "b"], "one")
    known.remember(["a", "b", "c"], "two")
    assert known.longest(["a", "b", "c", "d"], {"one", "two"}) == "two"
    assert known.longest(["a", "x"], {"one", "two"}) == "two"
    assert known.longest(["a", "b", "c"], {"one"}) is None
    assert (known.held("one"), known.held("two")) == (0, 3)


def test_the_oldest_prefix_is_forgotten() -> None:
    known = PrefixMap(capacity=2)
    known.remember(["a"], "one")
    known.remember(["b", "c"], "two")
    assert len(known) == 2
    assert known.longest(["a"], {"one"}) is None
    assert known.held("one") == 0


def test_new_conversations_spread_and_old_ones_stay() -> None:
    state = RoutingState(replicas={"one", "two"})
    idle = {"one": 0, "two": 0}
    for number in range(10):
        turn = keys(("user", f"Question {number}"))
        state.routed_to(state.choose(turn, idle) or "", turn)
    assert (state.prefixes.held("one"), state.prefixes.held("two")) == (5, 5)
    assert (state.routed, state.hits) == (10, 0)
    for number in range(10):
        turn = keys(("user", f"Question {number}"), REPLY, MORE)
        chosen = state.choose(turn, idle) or ""
        assert chosen == state.prefixes.longest(turn, idle)
        state.routed_to(chosen, turn)
    assert (state.routed, state.hits) == (20, 10)


def test_a_prefix_is_given_up_for_much_less_work() -> None:
    state = RoutingState(replicas={"one", "two"})
    state.routed_to("one", ["a"])
    assert state.choose(["a"], {"one": 4, "two": 0}) == "one"
    assert state.choose(["a"], {"one": 5, "two": 0}) == "two"
    assert state.choose([], {"one": 1, "two": 0}) == "two"
    assert state.choose(["a"], {}) is None
