"""Token trees: structure, builders and the best-first ranking."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linspec.decoding.tree import TokenTree, best_first, chain, from_paths, root_only, shape_of
from linspec.errors import ConfigError


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    size = draw(st.integers(1, 20))
    parents = (-1, *(draw(st.integers(0, node - 1)) for node in range(1, size)))
    tokens = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    return TokenTree(tuple(tokens), parents)


@st.composite
def accuracy_tables(draw: st.DrawFn) -> list[list[float]]:
    """Guesses per depth, likeliest first, as drafters rank them."""
    rates = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4)
    table = draw(st.lists(rates, min_size=1, max_size=3))
    return [sorted(row, reverse=True) for row in table]


def every_path(table: list[list[float]]) -> list[tuple[int, ...]]:
    depths = range(1, len(table) + 1)
    ranks = [range(len(row)) for row in table]
    return [path for depth in depths for path in itertools.product(*ranks[:depth])]


def probability(table: list[list[float]], path: tuple[int, ...]) -> float:
    return math.prod(table[depth][rank] for depth, rank in enumerate(path))


@given(trees())
def test_paths_depths_children_and_ancestors_tell_one_story(tree: TokenTree) -> None:
    assert len(tree) == len(tree.tokens)
    for node in range(len(tree)):
        path = tree.path_to(node)
        assert path[0] == 0
        assert path[-1] == node
        assert tree.depths[node] == len(path) - 1
        assert all(tree.parents[b] == a for a, b in itertools.pairwise(path))
        assert all(b in tree.children[a] for a, b in itertools.pairwise(path))
        assert tuple(tree.shape.ancestors[node].nonzero().flatten().tolist()) == path
    assert sorted(itertools.chain(*tree.children)) == list(range(1, len(tree)))
    assert all(list(children) == sorted(children) for children in tree.children)


@given(trees())
def test_a_tree_is_a_chain_iff_no_node_branches_off(tree: TokenTree) -> None:
    assert tree.shape.is_chain == (tree.depths == tuple(range(len(tree))))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=30))
def test_ancestors_of_a_chain_are_causal(tokens: list[int]) -> None:
    tree = chain(tokens)
    assert tree.shape.is_chain
    assert tree.tokens == tuple(tokens)
    assert torch.equal(tree.shape.ancestors, torch.ones(len(tree), len(tree)).tril().bool())


def test_root_only_is_a_tree_of_one_node() -> None:
    tree = root_only(7)
    assert tree == chain([7]) == from_paths(7, [])
    assert (tree.tokens, tree.parents, tree.children, tree.depths) == ((7,), (-1,), ((),), (0,))


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=8))
def test_from_paths_holds_every_prefix_once(paths: list[list[int]]) -> None:
    tree = from_paths(9, paths)
    held = [tuple(tree.tokens[n] for n in tree.path_to(node))[1:] for node in range(len(tree))]
    prefixes = {tuple(path[:end]) for path in paths for end in range(len(path) + 1)} | {()}
    assert tree.tokens[0] == 9
    assert len(held) == len(set(held))
    assert set(held) == prefixes


def test_from_paths_keeps_the_order_of_siblings() -> None:
    tree = from_paths(0, [(3, 1), (2,), (3, 0)])
    assert tree.tokens == (0, 3, 1, 2, 0)
    assert tree.parents == (-1, 0, 1, 0, 1)


@given(accuracy_tables(), st.integers(0, 30))
def test_best_first_equals_brute_force_for_every_budget(table, budget) -> None:
    chosen = best_first(table, budget)
    ranked = sorted((probability(table, path) for path in every_path(table)), reverse=True)
    assert len(chosen) == len(set(chosen)) == min(budget, len(ranked))
    assert [probability(table, path) for path in chosen] == pytest.approx(ranked[: len(chosen)])


@given(accuracy_tables(), st.integers(0, 30))
def test_best_first_lists_parents_and_better_siblings_first(table, budget) -> None:
    seen = {()}
    for path in best_first(table, budget):
        assert path[:-1] in seen
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in seen
        seen.add(path)


def test_best_first_goes_on_through_guesses_that_are_never_right() -> None:
    assert len(best_first([[1.0, 0.0, 0.0], [0.0]], 10)) == 6


def test_best_first_of_nothing_is_nothing() -> None:
    assert best_first([], 5) == best_first([[]], 5) == best_first([[0.5]], 0) == []


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [
        ((), ()),
        ((1, 2), (-1,)),
        ((1,), (0,)),
        ((1, 2), (-1, -1)),
        ((1, 2), (-1, 1)),
        ((1, 2, 3), (-1, 2, 0)),
        ((1, 2), (-1, -2)),
    ],
)
def test_broken_trees_are_refused(tokens, parents) -> None:
    with pytest.raises(ConfigError):
        TokenTree(tokens, parents)


def test_a_chain_needs_its_root() -> None:
    with pytest.raises(ConfigError, match="at least its root"):
        chain([])


def test_trees_of_one_form_share_what_is_computed_of_it() -> None:
    first, second = (TokenTree(tokens, (-1, 0, 0)) for tokens in ((1, 2, 3), (4, 5, 6)))
    assert first.shape is second.shape is shape_of([-1, 0, 0])
    assert first.shape.ancestor_bits == (0b001, 0b011, 0b101)
    assert first.shape.deepest == 1 and shape_of(()).deepest == 0


def test_nodes_that_are_staged_apart_may_have_several_roots() -> None:
    shape = shape_of([-1, -1, 1, 0])
    assert shape.depths == (0, 0, 1, 1)
    assert shape.path_to(3) == (0, 3)
    assert shape.ancestors.tolist()[3] == [True, False, False, True]
    with pytest.raises(ConfigError, match="node 1 has parent 1, which is not before it"):
        shape_of([-1, 1])


def test_the_first_nodes_of_a_tree_are_a_tree() -> None:
    law = torch.tensor([0.5, 0.5])
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 0, 2), {0: law, 2: law}, (1.0, 0.5, 0.25, 0.5))
    cut = tree.first(2)
    assert (cut.tokens, cut.parents, cut.confidences) == ((1, 2), (-1, 0), (1.0, 0.5))
    assert list(cut.proposals) == [0]
    with pytest.raises(ConfigError, match="a confidence for each of its 2 nodes"):
        TokenTree((1, 2), (-1, 0), confidences=(1.0,))
