"""The first half of a round: what the policy plans and the drafter proposes becomes a tree for each sequence.

What a policy or a drafter raises about one sequence, or gets wrong about it, is that sequence's error alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.decoding.protocols import CausalModelConfig
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import NO_DRAFTS, Budget, TokenTree, root_only
from linspec.drafters.base import Drafter, check_answers, check_tree, name_of
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
        # nearly all rounds of a drafter that does not pay end here
        if not asked:
            return trees
        ends = [tokens_end(sequences[i]) for i, _ in asked]
        proposed = isolated([(sequences[i], budget) for i, budget in asked], self._drafted)
        for (i, _), end, tree in zip(asked, ends, proposed, strict=True):
            trees[i] = tree if tokens_end(sequences[i]) == end else changed_tokens(self.drafter)
        return trees

    def _planned(self, sequences: Sequence[RunningSequence]) -> list[Budget]:
        budgets = self.policy.plan(sequences, self.drafter)
        check_answers("policy", self.policy, budgets, len(sequences), "a Budget")
        return [self._within_room(*each) for each in zip(sequences, budgets, strict=True)]

    def _within_room(self, sequence: RunningSequence, budget: Budget) -> Budget:
        """As wide as planned, and no deeper than the request and the model have room."""
        if not isinstance(budget, Budget):
            raise DrafterError(
                f"policy {name_of(self.policy)!r} planned {shown(repr(budget))}; a plan is a Budget for "
                "each request, such as Budget.of(4)"
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
        check_answers("drafter", self.drafter, trees, len(asked), "a TokenTree")
        for (sequence, budget), tree in zip(asked, trees, strict=True):
            self._check(sequence, budget, tree)
        return [
            self._kept(sequence, tree) for (sequence, _), tree in zip(asked, trees, strict=True)
        ]

    def _check(self, sequence: RunningSequence, budget: Budget, tree: TokenTree) -> None:
        """Raise DrafterError for a tree that would harm the step that it shares with others."""
        check_tree(self.drafter, tree)
        if {*map(type, tree.tokens)} != {int}:
            raise self._foul(
                f"tokens {shown(repr(tree.tokens))}; token ids are whole numbers (int)"
            )
        if tree.tokens[0] != sequence.root or not budget.allows(tree):
            raise self._foul(
                f"{len(tree) - 1} draft tokens behind token {tree.tokens[0]}, "
                f"{tree.shape.deepest} deep; asked were at most {budget.nodes} behind token {sequence.root}, "
                f"{budget.depth} deep"
            )
        vocabulary = self.config.vocab_size
        if min(tree.tokens) < 0 or max(tree.tokens) >= vocabulary:
            raise self._foul(
                f"tokens {min(tree.tokens)} to {max(tree.tokens)}, but the model has "
                f"{vocabulary} tokens: ids go from 0 to {vocabulary - 1}"
            )

    def _foul(self, what: str) -> DrafterError:
        return DrafterError(f"drafter {name_of(self.drafter)!r} proposed {what}")

    def _kept(self, sequence: RunningSequence, tree: TokenTree) -> TokenTree:
        """The part of a proposed tree that is verified, where the verifier's rule allows a part."""
        if len(tree) == 1 or not may_cut(self.verifier, tree):
            return tree
        tree = sequence.sampler.possible(tree)
        if len(tree) == 1:
            return tree
        kept = max(0, self.policy.keep(sequence, tree)) + 1
        return tree if kept >= len(tree) else tree.first(kept)


def tokens_end(sequence: RunningSequence) -> tuple[int, list[int]]:
    """What a drafter that writes to `sequence.tokens` changes: how many there are, and the newest."""
    return len(sequence.tokens), sequence.tokens[-1:]


def changed_tokens(drafter: Drafter) -> DrafterError:
    """The error of a sequence whose tokens a drafter has changed."""
    return DrafterError(
        f"drafter {name_of(drafter)!r} changed sequence.tokens, which are the output; copy them first: "
        "list(sequence.tokens)"
    )
