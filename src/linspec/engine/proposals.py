"""The first half of a round: what the policy plans and the drafter proposes becomes a tree for each row.

What a policy or a drafter raises about one row, or gets wrong about it, is that row's error alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.decoding.protocols import GeneratorConfig
from linspec.decoding.sequence import Row
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
    config: GeneratorConfig

    def trees(self, rows: Sequence[Row]) -> list[TokenTree | Exception]:
        """A tree per row, or the error of the policy or the drafter about it."""
        trees: list[TokenTree | Exception] = [root_only(row.root) for row in rows]
        asked: list[tuple[int, Budget]] = []
        for i, budget in enumerate(isolated(rows, self._planned)):
            if isinstance(budget, Exception):
                trees[i] = budget
            elif budget.nodes:
                asked.append((i, budget))
        proposed = isolated([(rows[i], budget) for i, budget in asked], self._drafted)
        for (i, _), tree in zip(asked, proposed, strict=True):
            trees[i] = tree
        return trees

    def _planned(self, rows: Sequence[Row]) -> list[Budget]:
        budgets = self.policy.plan(rows, self.drafter)
        _check_count("policy", budgets, rows)
        return [self._within_room(*each) for each in zip(rows, budgets, strict=True)]

    def _within_room(self, row: Row, budget: Budget) -> Budget:
        """As wide as planned, and no deeper than the request and the model have room."""
        if not isinstance(budget, Budget):
            raise DrafterError(
                f"the policy planned {shown(repr(budget))}; a plan is a Budget for each request, such as "
                "Budget.of(4)"
            )
        # where nothing is drafted, nobody asks how much could be
        if budget.nodes <= 0:
            return NO_DRAFTS
        limit, room = self.config.position_limit, row.remaining - 1
        if limit is not None:
            room = min(room, limit - len(row.tokens))
        return budget.within(self.drafter.max_nodes, room)

    def _drafted(self, asked: Sequence[tuple[Row, Budget]]) -> list[TokenTree]:
        trees = self.drafter.propose([row for row, _ in asked], [budget for _, budget in asked])
        _check_count("drafter", trees, asked)
        for (row, budget), tree in zip(asked, trees, strict=True):
            self._check(row, budget, tree)
        return [self._kept(row, tree) for (row, _), tree in zip(asked, trees, strict=True)]

    def _check(self, row: Row, budget: Budget, tree: TokenTree) -> None:
        """Raise DrafterError for a tree that would harm the step that it shares with others."""
        if tree.tokens[0] != row.root or not budget.allows(tree):
            raise DrafterError(
                f"the drafter proposed {len(tree) - 1} draft tokens behind token {tree.tokens[0]}, "
                f"{tree.shape.deepest} deep; asked were at most {budget.nodes} behind token {row.root}, "
                f"{budget.depth} deep"
            )
        vocabulary = self.config.vocab_size
        if min(tree.tokens) < 0 or max(tree.tokens) >= vocabulary:
            raise DrafterError(
                f"the drafter proposed tokens {min(tree.tokens)} to {max(tree.tokens)}, but the model has "
                f"{vocabulary} tokens: ids go from 0 to {vocabulary - 1}"
            )

    def _kept(self, row: Row, tree: TokenTree) -> TokenTree:
        """The part of a proposed tree that is verified, where the verifier's rule allows a part."""
        if len(tree) == 1 or not may_cut(self.verifier, tree):
            return tree
        kept = max(0, self.policy.keep(row, tree)) + 1
        return tree if kept >= len(tree) else tree.first(kept)


def _check_count(what: str, given: Sequence[object], asked: Sequence[object]) -> None:
    if len(given) != len(asked):
        raise DrafterError(f"the {what} answered {len(given)} times for {len(asked)} requests")
