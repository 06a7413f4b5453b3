"""Where requests go: together while load allows, evenly beyond that, and back when a replica leaves."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.serve.routing import CHARACTERS, SHARE, opening, ranked

NAMES = st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=8)
KEYS = st.text(max_size=20)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def home(key: str, names: set[str]) -> str:
    return ranked(key, dict.fromkeys(names, 0), 1)[0]


@settings(deadline=None)
@given(KEYS, st.dictionaries(st.text("abc", min_size=1), st.integers(0, 30)), st.integers(1, 9))
def test_every_replica_is_named_once_and_the_home_is_first_while_it_has_room(
    key: str, loads: dict[str, int], roomy: int
) -> None:
    order = ranked(key, loads, roomy)
    assert sorted(order) == sorted(loads)
    if not loads:
        return
    own = home(key, set(loads))
    if loads[own] < roomy:
        assert order[0] == own
    assert order[0] in (own, min(order, key=lambda name: loads[name]))
    # the others are tried from the least loaded on
    rest = [loads[name] for name in order[1:]]
    assert rest == sorted(rest)


@settings(deadline=None)
@given(KEYS, NAMES, st.randoms())
def test_a_home_does_not_depend_on_the_order_in_which_replicas_are_known(
    key: str, names: set[str], rng: Any
) -> None:
    mixed = sorted(names)
    rng.shuffle(mixed)
    assert ranked(key, dict.fromkeys(mixed, 0), 1)[0] == home(key, names)


@settings(deadline=None)
@given(st.lists(KEYS, max_size=30), NAMES, st.data())
def test_only_the_beginnings_of_a_replica_that_leaves_move(
    keys: list[str], names: set[str], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(names)))
    for key in keys:
        before = home(key, names)
        if before != gone:
            assert home(key, names - {gone}) == before


def test_homes_are_spread_evenly() -> None:
    names = {f"replica-{n}" for n in range(4)}
    counts = Counter(home(f"prompt {n}", names) for n in range(4000))
    assert set(counts) == names
    # six standard deviations of a fair throw
    assert all(abs(count - 1000) < 6 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from(["a", "a", "a", "b", "c"]), max_size=60),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_one_beginning_that_everybody_asks_for_does_not_overload_its_home(
    keys: list[str], replicas: int, roomy: int
) -> None:
    loads = {str(n): 0 for n in range(replicas)}
    for key in keys:
        loads[ranked(key, loads, roomy)[0]] += 1
        mean = sum(loads.values()) / replicas
        assert max(loads.values()) <= max(roomy, SHARE * mean, mean + 1)


@settings(deadline=None)
@given(st.text(max_size=400), st.text(min_size=1, max_size=400), st.lists(st.text(max_size=50)))
def test_a_chat_that_grows_keeps_its_home(system: str, first: str, later: list[str]) -> None:
    turns = [{"role": "system", "content": system}, {"role": "user", "content": first}]
    more = [{"role": ("assistant", "user")[n % 2], "content": t} for n, t in enumerate(later)]

    def key(messages: list[dict[str, str]]) -> str | None:
        return opening(CHAT, json.dumps({"messages": messages}).encode())

    assert key(turns) == key(turns + more) is not None
    # the same text in parts is the same text
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    assert key(parts) == key(turns)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.text(min_size=CHARACTERS, max_size=CHARACTERS + 9), st.text(max_size=50))
def test_prompts_that_begin_alike_belong_together(start: str, end: str) -> None:
    def key(prompt: object, tenant: str = "") -> str | None:
        return opening(COMPLETIONS, json.dumps({"prompt": prompt}).encode(), tenant)

    assert key(start) == key(start + end) == key([start + end, "other"])
    assert key(start, "alice") != key(start, "bob")
    numbers = list(range(100))
    assert key(numbers) == key([*numbers, 5]) == key([numbers]) != key(numbers[1:])


@settings(deadline=None)
@given(st.sampled_from([CHAT, COMPLETIONS, "/v1/responses", "/v1/embeddings", "/"]), JSON, JSON)
def test_any_body_has_an_opening_or_none(path: str, body: Any, content: Any) -> None:
    fields = ("messages", "prompt", "input", "instructions")
    for data in (body, dict.fromkeys(fields, content), {key: [content] for key in fields}):
        found = opening(path, json.dumps(data).encode())
        assert found is None or len(found) < CHARACTERS * 3
    for broken in (
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    ):
        assert opening(path, broken) is None
