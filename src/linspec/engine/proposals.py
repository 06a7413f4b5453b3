"""The first half of a round: what the policy plans and the drafter proposes becomes a tree for each sequence.

What a policy or a drafter raises about one sequence, or gets wrong about it, is that sequence's error alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.decoding.protocols import CausalModelConfig
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import NO_DRAFTS, Budget, TokenTree, root_only
from linspec.drafters.base import Drafter
from linspec.errors import DrafterError
from linspec.policies.base import Policy
from linspec.utils.isolation import isolated
from linspec.utils.messages import shown
from linspec.verifiers.base import Verifier, may_cut


@dataclass(frozen=True, slots=True)
class Proposals:
    """Asks a policy and a drafter about trees that a verifier will judge, for a model of `config`."""

    drafter: Drafter
    policy: Policy
    verifier: Verifier
    config: CausalModelConfig

    def trees(self, sequences: Sequence[RunningSequence]) -> list[TokenTree | Exception]:
        """A tree per sequence, or the error of the policy or the drafter about it."""
        trees: list[TokenTree | Exception] = [root_only(sequence.root) for sequence in sequences]
        asked: list[tuple[int, Budget]] = []
        for i, budget in enumerate(isolated(sequences, self._planned)):
            if isinstance(budget, Exception):
                trees[i] = budget
            elif budget.nodes:
                asked.append((i, budget))
        proposed = isolated([(sequences[i], budget) for i, budget in asked], self._drafted)
        for (i, _), tree in zip(asked, proposed, strict=True):
            trees[i] = tree
        return trees

    def _planned(self, sequences: Sequence[RunningSequence]) -> list[Budget]:
        budgets = self.policy.plan(sequences, self.drafter)
        _check_count("policy", budgets, sequences)
        return [self._within_room(*each) for each in zip(sequences, budgets, strict=True)]

    def _within_room(self, sequence: RunningSequence, budget: Budget) -> Budget:
        """As wide as planned, and no deeper than the request and the model have room."""
        if not isinstance(budget, Budget):
            raise DrafterError(
                f"the policy planned {shown(repr(budget))}; a plan is a Budget for each request, such as "
                "Budget.of(4)"
            )
        # where nothing is drafted, nobody asks how much could be
        if budget.nodes <= 0:
            return NO_DRAFTS
        limit, room = self.config.position_limit, sequence.remaining - 1
        if limit is not None:
            room = min(room, limit - len(sequence.tokens))
        return budget.within(self.drafter.max_nodes, room)

    def _drafted(self, asked: Sequence[tuple[RunningSequence, Budget]]) -> list[TokenTree]:
        trees = self.drafter.propose(
            [sequence for sequence, _ in asked], [budget for _, budget in asked]
        )
        _check_count("drafter", trees, asked)
        for (sequence, budget), tree in zip(asked, trees, strict=True):
            self._check(sequence, budget, tree)
        return [
            self._kept(sequence, tree) for (sequence, _), tree in zip(asked, trees, strict=True)
        ]

    def _check(self, sequence: RunningSequence, budget: Budget, tree: TokenTree) -> None:
        """Raise DrafterError for a tree that would harm the step that it shares with others."""
        if tree.tokens[0] != sequence.root or not budget.allows(tree):
            raise DrafterError(
                f"the drafter proposed {len(tree) - 1} draft tokens behind token {tree.tokens[0]}, "
                f"{tree.shape.deepest} deep; asked were at most {budget.nodes} behind token {sequence.root}, "
                f"{budget.depth} deep"
            )
        vocabulary = self.config.vocab_size
        if min(tree.tokens) < 0 or max(tree.tokens) >= vocabulary:
            raise DrafterError(
                f"the drafter proposed tokens {min(tree.tokens)} to {max(tree.tokens)}, but the model has "
                f"{vocabulary} tokens: ids go from 0 to {vocabulary - 1}"
            )

    def _kept(self, sequence: RunningSequence, tree: TokenTree) -> TokenTree:
        """The part of a proposed tree that is verified, where the verifier's rule allows a part."""
        if len(tree) == 1 or not may_cut(self.verifier, tree):
            return tree
        kept = max(0, self.policy.keep(sequence, tree)) + 1
        return tree if kept >= len(tree) else tree.first(kept)


def _check_count(what: str, given: Sequence[object], asked: Sequence[object]) -> None:
    if len(given) != len(asked):
        raise DrafterError(f"the {what} answered {len(given)} times for {len(asked)} requests")
