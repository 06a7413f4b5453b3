"""What a prefix cache, running slots and snapshots share: pages, each of them once."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from engine.test_shared_prompts import KINDS, apart, engine_of, fast, outputs, params_of, run
from helpers import random_tokens, tiny_model

from linspec.decoding.request import Request
from linspec.engine.budget import PIECE
from linspec.engine.engine import Engine
from linspec.engine.prefix_cache import PrefixOptions
from linspec.engine.prefix_tree import Node
from linspec.state.pages import PAGE, Page, bytes_of


def kept_pages(engine: Engine) -> list[Page]:
    """The pages that the prefix cache holds."""
    assert engine.prefix_cache is not None
    found: list[Page] = []
    left: list[Node] = list(engine.prefix_cache._roots.values())
    while left:
        node = left.pop()
        left += node.children.values()
        found += [page for each in node.pages for page in each]
    return found


def pool_of(engine: Engine) -> Any:
    return engine.state.parts[0].pool


def begun(engine: Engine, prompt: list[int], tokens: int = 90) -> int:
    """The slot of a request whose prompt is read."""
    engine.add(Request(tuple(prompt), params_of(1, tokens=tokens)))
    while engine.waiting or any(each.prefilling for each in engine.scheduler.running):
        engine.step()
    return max(engine.scheduler.running, key=lambda each: each.number).slot


@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_copies_no_full_page(kind: str) -> None:
    model, prompt = fast("softmax"), random_tokens(10 * PAGE + 5, seed=1)
    engine = engine_of(model, cached=True, kv_cache_dtype=kind)
    run(engine, Request(tuple(prompt), params_of(1)))
    known, before = kept_pages(engine), pool_of(engine).bytes
    slot = begun(engine, [*prompt, 1, 2, 3])
    (running,) = engine.scheduler.running
    assert running.cached_tokens >= len(prompt)
    held = engine.state.held_pages(slot)
    assert len(held) == 10 and set(held) <= set(known)
    # only what is behind the last full page is new
    assert pool_of(engine).bytes - before <= engine.state.bytes_at(2 * PAGE)
    assert bytes_of([*held, *kept_pages(engine)]) == pool_of(engine).bytes


@pytest.mark.crossed(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [0, 10 * PAGE])
def test_what_is_evicted_stays_with_those_who_run(kind: str, cached: int) -> None:
    model, prompt = fast("softmax"), random_tokens(5 * PAGE + 40, seed=2)
    engine = engine_of(model, cached=True, kv_cache_dtype=kind)
    run(engine, Request(tuple(prompt), params_of(1)))
    handle = engine.add(Request(tuple(prompt), params_of(3, tokens=40)))
    done, cache = {}, engine.prefix_cache
    assert cache is not None
    while engine.busy:
        done |= {each.sequence.index: each.sequence for each in engine.step() if each.finished}
        # all that fits into so many bytes stays
        cache.options = PrefixOptions(bytes=cached * engine.state.bytes_at(1), least=2)
        cache._shrink()
        assert cache.bytes <= cache.options.bytes
    assert handle and outputs([done[i] for i in range(3)]) == apart(
        model, prompt, params_of(3, tokens=40), kv_cache_dtype=kind
    )
    for slot in range(engine.state.slots):
        engine.state.reset(slot)
    assert bytes_of(kept_pages(engine)) == pool_of(engine).bytes
    cache.clear()
    gc.collect()
    assert not len(pool_of(engine))


def test_the_state_of_slots_counts_shared_pages_once() -> None:
    engine = engine_of(fast("softmax"), cached=True)
    prompt = random_tokens(8 * PAGE, seed=3)
    first, second = begun(engine, prompt), begun(engine, [*prompt, 7])
    shared = set(engine.state.held_pages(first)) & set(engine.state.held_pages(second))
    assert first != second and len(shared) >= 7
    apart_bytes = engine.state.bytes(first) + engine.state.bytes(second)
    together = engine.state.bytes(first, second)
    assert apart_bytes - together >= engine.state.bytes_at(7 * PAGE)
    assert together >= engine.state.bytes(second)


@pytest.mark.parametrize("mixer", ["aug", "gla", "gdn", "window", "by-head", "linformer"])
def test_who_asks_the_same_again_is_known_the_second_time(mixer: str) -> None:
    """A model with sums goes on at a border: the last one of the prompt is kept."""
    engine, prompt = engine_of(tiny_model(mixer), cached=True), random_tokens(3 * PIECE + 9, seed=4)
    found = [run(engine, Request(tuple(prompt), params_of(1)))[0] for _ in range(3)]
    known = [sequences[0].cached_tokens for sequences in found]
    assert known == [0, 3 * PIECE, 3 * PIECE]
    assert outputs(found[1]) == outputs(found[2]) == outputs(found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_who_leaves_its_slot_takes_its_pages_along(kind: str) -> None:
    """And brings them back: pre-emption copies what is behind them."""
    engine = engine_of(fast("softmax"), kv_cache_dtype=kind, slots=1)
    slot = begun(engine, random_tokens(6 * PAGE + 3, seed=5))
    copy = engine.state.snapshot(slot)
    held, before = engine.state.held_pages(slot), pool_of(engine).bytes
    engine.state.reset(slot)
    assert pool_of(engine).bytes == before
    engine.state.restore(slot, copy)
    assert engine.state.held_pages(slot) == held and pool_of(engine).bytes == before
