"""ADED: its search finds the tree of the published one, and its table adapts within its memory."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from checkpoints import model_dir
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from puct import paths, search
from replay import Round, per_round, replay, running
from test_engine import PROMPTS, decode, outputs

from linspec import LLM
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.aded import Aded, AdedOptions
from linspec.drafters.counted import Trust
from linspec.drafters.trigrams import CAP, SUCCESSORS, Trigrams
from linspec.errors import ConfigError, DrafterError
from linspec.policies.fixed import Fixed

FROZEN = AdedOptions(gain=0.0, depth=4, min_prob=1e-6)


class Sure(Trust):
    """Holds every share for true, as the published search does."""

    def rate(self, evidence: int) -> float:
        return 1.0


def two_ways(first: float, pairs: int = 1000) -> Trigrams:
    """After (0, 0) token 1 with share `first`, or token 2; 1s and 2s then go on as they are."""
    table = Trigrams(pairs)
    table.reinforce([0, 0, 1], first)
    table.reinforce([0, 0, 2], 1 - first)
    for token in (1, 2):
        table.reinforce([0, token, token], 1.0)
        table.reinforce([token, token, token], 1.0)
    return table


def random_table(seed: int, vocabulary: int = 6) -> Trigrams:
    rng, table = random.Random(seed), Trigrams(1000)
    weights = [rng.random() ** 3 for _ in range(vocabulary)]
    for first in range(vocabulary):
        for second in range(vocabulary):
            for third in rng.choices(range(vocabulary), weights, k=3):
                table.reinforce([first, second, third], rng.random())
    return table


def drafted(table: Trigrams, nodes: int) -> TokenTree:
    """The tree of the drafter with this table after the tokens 0, 0, which learns nothing."""
    drafter = Aded(options=FROZEN)
    drafter.table, drafter.trust = table, Sure()
    return drafter.propose([running([0, 0])], [Budget.of(nodes)])[0]


def routes(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[n] for n in tree.path_to(node)[1:]) for node in range(1, len(tree))]


def reach(table: Trigrams, route: tuple[int, ...]) -> float:
    """Chance that the whole of a path is accepted if the table is right."""
    pair, chance = (0, 0), 1.0
    for token in route:
        chance *= dict(table.successors(pair)).get(token, 0.0)
        pair = (pair[1], token)
    return chance


def test_of_two_ways_both_are_searched_and_the_likelier_one_first() -> None:
    table = two_ways(0.9)
    explored, greedy = (paths(search(table, (0, 0), c1=c1)) for c1 in (32.0, 0.0))
    assert explored[1,] > explored[2,] > greedy[2,] > 0
    found = routes(drafted(table, 8))
    assert found.index((1,)) < found.index((2,)) and len(found) == 8
    # turned round, so is the tree
    turned = routes(drafted(two_ways(0.1), 8))
    assert turned == [tuple(3 - token for token in route) for route in found]


@pytest.mark.parametrize("nodes", [4, 8, 24])
def test_the_tree_is_that_of_the_published_search(nodes: int) -> None:
    """At equal nodes it holds what the iterations visited most, and is never worse by the table."""
    shared = []
    for seed in range(20):
        table = random_table(seed)
        visits = paths(search(table, (0, 0), seed=seed))
        most = sorted(visits, key=lambda route: (-visits[route], len(route)))[:nodes]
        tree = routes(drafted(table, nodes))
        # the iterations may end before they have seen every path
        assert len(most) <= len(tree) <= nodes
        value, published = (sum(reach(table, r) for r in each) for each in (tree, most))
        assert value >= published - 1e-9
        shared.append(len({*tree} & {*most}) / len(most))
    assert sum(shared) / len(shared) >= 0.9


@pytest.mark.parametrize("nodes", [3, 10])
def test_no_tree_of_as_many_nodes_is_likelier(nodes: int) -> None:
    for seed in range(5):
        table = random_table(seed, vocabulary=3)
        every = {
            route for size in range(1, 5) for route in _routes(3, size) if reach(table, route) > 0
        }
        best = sorted((reach(table, route) for route in every), reverse=True)[:nodes]
        # chances fall along a path, so the likeliest nodes are a tree
        found = [reach(table, route) for route in routes(drafted(table, nodes))]
        assert found == pytest.approx(best)


def _routes(vocabulary: int, size: int) -> list[tuple[int, ...]]:
    if not size:
        return [()]
    return [(*r, t) for r in _routes(vocabulary, size - 1) for t in range(vocabulary)]


def stream(seed: int, tokens: int = 1200) -> list[int]:
    """Text of a source that repeats itself: each pair has a favourite and two others."""
    rng = random.Random(seed)
    favourites = {(a, b): rng.choices(range(30), k=3) for a in range(30) for b in range(30)}
    text = [0, 1]
    while len(text) < tokens:
        text += rng.choices(favourites[text[-2], text[-1]], [8, 1, 1])
    return text


def quarters(rounds: list[Round]) -> tuple[float, float]:
    size = len(rounds) // 4
    return per_round(rounds[:size]), per_round(rounds[-size:])


def test_a_stream_that_repeats_itself_is_drafted_ever_better() -> None:
    first, last = quarters(replay(Aded(), [0], stream(1)))
    assert last >= 1.1 * first
    # a frozen table learns nothing
    frozen = Aded(options=AdedOptions(gain=0.0))
    frozen.table.reinforce(stream(1)[:300], 0.04)
    first, last = quarters(replay(frozen, [0], stream(1)[300:]))
    assert last <= 1.1 * first


def test_another_request_begins_where_this_one_ended() -> None:
    drafter = Aded()
    first, again = (per_round(replay(drafter, [0], stream(2)[:400])) for _ in range(2))
    assert again > 1.2 * first


@given(st.lists(st.integers(0, 5), max_size=200), st.integers(1, 10))
def test_the_table_keeps_to_its_memory(text: list[int], pairs: int) -> None:
    table = Trigrams(pairs)
    table.reinforce(text, 0.5)
    assert len(table) <= pairs
    # the newest pairs are those that are left
    newest = dict.fromkeys(zip(text[::-1][2:], text[::-1][1:], strict=False))
    known = [(a, b) for a, b in newest][:pairs]
    assert len(table) == len(known) and all(map(table.successors, known))
    for pair in known:
        shares = [share for _, share in table.successors(pair)]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)


def test_weights_are_bounded_and_old_habits_are_unlearned() -> None:
    table = Trigrams(10)
    for token in range(40):
        table.reinforce([0, 0, token], 0.04)
    assert len(table.successors((0, 0))) == SUCCESSORS
    for _ in range(1000):
        table.reinforce([0, 0, 7], 0.04)
    assert table.weight((0, 0)) <= CAP + SUCCESSORS
    needed = 0
    while table.successors((0, 0))[0][0] != 8:
        table.reinforce([0, 0, 8], 0.04)
        needed += 1
    assert needed <= CAP / 0.04


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_the_output_is_that_without_drafts(mixer: str) -> None:
    """Greedy and sampled, alone and in ragged batches, with tables of other requests."""
    model = tiny_model(mixer)
    params = [
        SamplingParams(max_tokens=20 + i, temperature=0.0 if i % 2 else 1.0, seed=i)
        for i in range(len(PROMPTS))
    ]
    plain = [outputs(decode(model, [p], each))[0] for p, each in zip(PROMPTS, params, strict=True)]
    drafter = Aded()
    for _ in range(2):
        rows = decode(model, PROMPTS, params, drafter, policy=Fixed(12))
        assert outputs(rows) == plain
        assert outputs(decode(model, PROMPTS[::-1], params[::-1], drafter, slots=2)) == plain[::-1]
    assert sum(row.stats.accepted for row in rows) > 0


def test_the_same_rounds_give_the_same_trees() -> None:
    text = stream(3)[:400]
    first, second = (replay(Aded(), [0], text) for _ in range(2))
    assert first == second
    drafter, sequence = Aded(), running(text)
    budget = [Budget(12, 3)]
    tree = drafter.propose([sequence], budget)
    assert drafter.propose([sequence], budget) == tree and budget[0].allows(tree[0])


def test_the_confidence_is_what_is_accepted() -> None:
    drafter = Aded()
    replay(drafter, [0], stream(4))
    rounds = replay(drafter, [0], stream(4))
    promised, found = (sum(getattr(r, name) for r in rounds) for name in ("score", "accepted"))
    assert found == pytest.approx(promised, rel=0.25)
    assert 1 < drafter.expected(Budget.of(16)) < 5


def test_a_table_of_a_text_drafts_from_the_first_round(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcd the end of the end abcd " * 20, encoding="utf-8")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    llm = LLM(model_dir("aug"), drafter=f"aded:{text}", policy=8)
    (known,) = llm.generate(["abcd the"], params)
    assert known.token_ids == LLM(model_dir("aug")).generate(["abcd the"], params)[0].token_ids
    drafter = make_drafter(f"aded:{text}", DrafterContext(llm.model, llm.tokenizer))
    assert drafter is not None
    ids = llm.encode("abcd the end of the end", add_special_tokens=False)
    rounds = replay(drafter, ids[:2], ids[2:])
    assert per_round(rounds) >= 1.4 and math.isfinite(rounds[0].score)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("depth=0", "depth"),
        ("pairs=0", "pairs"),
        ("min_prob=0", "min_prob"),
        ("tokens=64", "tokens"),
        ("window=-1", "window"),
        ("gain=2", "gain"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_drafter(f"aded:{setting}", DrafterContext(tiny_model("aug")))


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    context = DrafterContext(tiny_model("aug"), LLM(model_dir("aug")).tokenizer)
    with pytest.raises(DrafterError, match="cannot read the text .*nothing.txt"):
        make_drafter(f"aded:{tmp_path / 'nothing.txt'}", context)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DrafterError, match="cannot read the text"):
        make_drafter(f"aded:{tmp_path / 'bytes'}", context)
    with pytest.raises(DrafterError, match="none was given"):
        make_drafter(f"aded:{tmp_path / 'bytes'}", DrafterContext(tiny_model("aug")))
