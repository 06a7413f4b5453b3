"""Budgets: near the end of its room a tree is bounded in depth alone, and what a policy may cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from helpers import random_tokens, tiny_model
from test_engine import DRAFTERS, PROMPTS, SLOTS, decode, outputs, random_heads

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import NO_DRAFTS, Budget, TokenTree, chain, from_paths
from linspec.drafters.base import Drafter
from linspec.drafters.draft_model import DraftModel
from linspec.drafters.lookup import PromptLookup
from linspec.engine.engine import Engine
from linspec.errors import DrafterError
from linspec.models.decoder import Decoder
from linspec.policies.base import Policy
from linspec.policies.fixed import Fixed
from linspec.verifiers import GreedyVerifier, LosslessVerifier, TypicalVerifier
from linspec.verifiers.base import may_cut


class Watched(Drafter):
    """A drafter, what it was asked for, and what it proposed."""

    name = "test-watched"

    def __init__(self, inner: Drafter) -> None:
        self.inner, self.max_nodes = inner, inner.max_nodes
        self.seen: list[tuple[int, Budget, TokenTree]] = []

    def propose(
        self, rows: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        trees = self.inner.propose(rows, budgets)
        lengths = [len(row.tokens) for row in rows]
        self.seen += zip(lengths, budgets, trees, strict=True)
        return trees

    def expected(self, budget: Budget) -> float:
        return self.inner.expected(budget)

    def observe(self, row: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        self.inner.observe(row, tree, path)

    def release(self, slot: int) -> None:
        self.inner.release(slot)


class Cutter(Fixed):
    """A policy that has only some of the first nodes verified, by chance and by the tokens themselves."""

    def __init__(self, nodes: int) -> None:
        super().__init__(nodes)
        self.rng, self.asked, self.dropped = random.Random(5), 0, 0

    def keep(self, row: RunningSequence, tree: TokenTree) -> int:
        self.asked += 1
        kept = self.rng.randrange(len(tree)) if tree.tokens[1] % 3 else 0
        self.dropped += len(tree) - 1 - kept
        return kept


def test_the_parts_of_a_budget() -> None:
    assert Budget.of(5) == Budget(nodes=5, depth=5)
    assert Budget.of(12).within(63, 2) == Budget(12, 2)
    assert Budget.of(12).within(8, 20) == Budget(8, 12)
    assert Budget(4, 1).chain == 1 and Budget(2, 6).chain == 2
    assert Budget.of(3).within(63, 0) == Budget.of(3).within(63, -2) == NO_DRAFTS
    bush = from_paths(0, [(1, 2), (3,), (4,)])
    assert Budget(4, 2).allows(bush)
    assert not Budget(4, 1).allows(bush) and not Budget(3, 2).allows(bush)


@pytest.mark.parametrize("most", range(1, 9))
def test_a_wide_tree_near_max_tokens_stays_wide(most: int) -> None:
    """It was once cut as if it were deep: to as many nodes as there was room for tokens."""
    model = tiny_model("aug")
    plain = outputs(decode(model, PROMPTS[2:], SamplingParams(max_tokens=most)))
    drafter = Watched(random_heads(model))
    rows = decode(model, PROMPTS[2:], SamplingParams(max_tokens=most), drafter)
    assert outputs(rows) == plain
    assert bool(drafter.seen) is (most > 2)
    check_medusa(drafter)
    # 2 tokens at depth 1, and 4 at depth 2
    assert {len(tree) - 1 for _, budget, tree in drafter.seen if budget.depth == 1} <= {2}


def check_medusa(drafter: Watched) -> None:
    """Every tree was as large as its budget, or had all the paths of its depth: 2, 6 and 10."""
    for _, budget, tree in drafter.seen:
        paths = {1: 2, 2: 6}.get(budget.depth, 10)
        assert budget.nodes == 6
        assert len(tree) - 1 == min(budget.nodes, paths)
        assert budget.allows(tree)


@pytest.mark.parametrize("name", ["medusa", "random", "itself", "lookup"])
@pytest.mark.parametrize("limit", [18, 20, 23])
def test_drafts_near_the_last_position_are_bounded_in_depth_alone(name: str, limit: int) -> None:
    model = tiny_model("softmax", max_positions=limit)
    prompts = [random_tokens(15), [4, 5, 6] * 5, random_tokens(limit)]
    params = SamplingParams(max_tokens=50)
    plain = outputs(decode(model, prompts, params))
    drafter = Watched(DRAFTERS[name](model))
    assert outputs(decode(model, prompts, params, drafter)) == plain
    assert drafter.seen
    for length, budget, tree in drafter.seen:
        assert budget == Budget(6, min(6, limit - length))
        # the root has the position length - 1
        assert length - 1 + tree.shape.deepest < limit
    if name == "medusa":
        check_medusa(drafter)
        assert any(budget.depth == 1 for _, budget, _ in drafter.seen)


def test_a_tree_deeper_than_asked_is_refused() -> None:
    class Deep(PromptLookup):
        def propose(
            self, rows: Sequence[RunningSequence], budgets: Sequence[Budget]
        ) -> list[TokenTree]:
            return [chain((row.root, 1, 2, 3)) for row in rows]

    model = tiny_model("aug")
    engine = Engine(model, verifier=LosslessVerifier(), drafter=Deep(), policy=Fixed(3), slots=1)
    engine.add(Request(tuple(PROMPTS[1]), SamplingParams(max_tokens=3)))
    engine.step()
    (end,) = engine.step()
    assert isinstance(end.error, DrafterError)
    assert "3 deep; asked were at most 3 behind" in str(end.error) and "1 deep" in str(end.error)


def test_a_policy_that_plans_numbers_is_told_what_a_plan_is() -> None:
    class Numbers(Policy):
        name = "test-numbers"

        def plan(self, rows: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
            return [4 for _ in rows]  # type: ignore[misc]

    model = tiny_model("aug")
    engine = Engine(
        model, verifier=LosslessVerifier(), drafter=PromptLookup(), policy=Numbers(), slots=1
    )
    engine.add(Request(tuple(PROMPTS[1]), SamplingParams(max_tokens=3)))
    engine.step()
    (end,) = engine.step()
    assert isinstance(end.error, DrafterError) and r"planned 4; a plan is a Budget" in str(
        end.error
    )


# ---- what the verifier's contract says about cutting


@pytest.mark.crossed(3)
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_policy_that_cuts_trees_keeps_greedy_outputs(name: str) -> None:
    model, policy = tiny_model("aug"), Cutter(6)
    plain = outputs(decode(model, PROMPTS, SamplingParams(max_tokens=24)))
    rows = decode(
        model, PROMPTS, SamplingParams(max_tokens=24), DRAFTERS[name](model), policy=policy
    )
    assert outputs(rows) == plain
    assert policy.dropped > 5


@pytest.mark.parametrize("name", ["lookup", "random", "medusa"])
def test_a_policy_that_cuts_certain_drafts_keeps_what_a_seed_gives(name: str) -> None:
    model, policy = tiny_model("softmax"), Cutter(6)
    params = [SamplingParams(max_tokens=24, temperature=0.9, seed=s) for s in range(5)]
    plain = outputs(decode(model, PROMPTS, params))
    assert outputs(decode(model, PROMPTS, params, DRAFTERS[name](model), policy=policy)) == plain
    assert policy.dropped > 5


def test_sampled_drafts_of_a_rule_that_divides_are_not_cut() -> None:
    model, params = tiny_model("aug"), SamplingParams(max_tokens=24, temperature=1.0, seed=1)
    policies = Fixed(6), Cutter(6)
    whole, cut = (
        outputs(decode(model, PROMPTS, params, itself(model), policy=policy)) for policy in policies
    )
    assert policies[1].asked == 0
    assert cut == whole


def itself(model: Decoder) -> Drafter:
    return DraftModel(model, model.config, SLOTS)


def test_which_trees_may_be_cut() -> None:
    certain = chain((1, 2))
    sampled = chain((1, 2), {0: torch.tensor([0.5, 0.5])})
    for verifier in (GreedyVerifier(), LosslessVerifier(), TypicalVerifier()):
        assert may_cut(verifier, certain)
        assert may_cut(verifier, sampled) is not verifier.divides
    assert LosslessVerifier.divides and not GreedyVerifier.divides

    class Silent:
        """A rule from outside that does not say."""

    assert not may_cut(Silent(), sampled)  # type: ignore[arg-type]
    assert may_cut(Silent(), certain)  # type: ignore[arg-type]
