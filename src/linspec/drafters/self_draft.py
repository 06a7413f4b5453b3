"""Drafts by another form of the target itself, on the target's own state.

A form has the target's weights, or copies of them in fewer bits, and computes less. Its steps are staged
behind what the target has committed, and dropped before the target verifies. So it needs no state of its own
and does not read the prompt again, and of what is committed its drafts read what the target itself has
written: keys and values of softmax layers, sums of linear ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.base import ChainDrafter, DrafterContext, name_of
from linspec.errors import DrafterError
from linspec.models.decoder import Decoder

# how many of the likeliest tokens are drafted where the likeliest one has more than this (SWIFT, greedy)
_WIDTHS = ((0.95, 1), (0.8, 3), (0.5, 5), (0.0, 8))


class SelfDraft(ChainDrafter):
    """Trees of certain drafts: a chain, and beside it what else is likely.

    Where the request samples, a draft is drawn by the random number that the target will use at its
    position. It is no less certain for that: the output is that of plain decoding, token for token.

    least: drafting ends behind a token that the form holds less likely than this.
    """

    def __init__(self, context: DrafterContext, *, tokens: int, least: float) -> None:
        super().__init__(context)
        context.decoder(name_of(self))
        self.tokens, self.least = tokens, least
        self.target: Target | None = None
        self.form: Decoder | None = None

    @abstractmethod
    def make(self, model: Decoder) -> Decoder:
        """The form of the target that drafts first."""

    def attached(self, target: Target) -> None:
        assert isinstance(target.model, Decoder), "checked when this was made"
        self.target, self.form = target, self.make(target.model)

    def pays(self, sequence: RunningSequence) -> bool:
        """Whether a draft of this sequence can be cheaper than a step of the target."""
        return True

    def form_of(self, sequence: RunningSequence) -> Decoder:
        """Which form drafts for this sequence."""
        assert self.form is not None
        return self.form

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        if self.target is None:
            raise DrafterError(
                f"drafter {name_of(self)!r} drafts on the state of an engine and has none; give it to an LLM"
            )
        growing = [
            GrowingTree(sequence, budget, self.tokens, self.least)
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]
        by_form: dict[int, list[GrowingTree]] = {}
        for tree in growing:
            if not self.pays(tree.sequence):
                continue
            by_form.setdefault(id(self.form_of(tree.sequence)), []).append(tree)
        for trees in by_form.values():
            grow(self.form_of(trees[0].sequence), self.target.state, trees)
        return [tree.tree() for tree in growing]


def grow(form: Decoder, state: Any, trees: Sequence[GrowingTree]) -> None:
    """Draft as long as a tree wants more, all of them in one step for each depth."""
    live = sorted(trees, key=lambda tree: tree.sequence.slot)
    try:
        while live:
            inputs = [tree.step_input() for tree in live]
            logits = form.step(inputs, state).logits
            live = [tree for tree, scores in zip(live, logits, strict=True) if tree.take(scores)]
    finally:
        for tree in trees:
            state.drop(tree.sequence.slot)


class GrowingTree:
    """The tree of one sequence while it is drafted: a chain, and the likeliest tokens beside it."""

    def __init__(
        self, sequence: RunningSequence, budget: Budget, tokens: int, least: float
    ) -> None:
        self.sequence, self.budget, self.least = sequence, budget, least
        self.depth = min(budget.chain, tokens)
        self.chain = [sequence.root]
        greedy = sequence.sampler.greedy
        self._numbers = [] if greedy else sequence.sampler.coming(self.depth)
        # how likely the chain is as far as it goes; beside it: likelihood, depth and token
        self._reach = 1.0
        self._beside: list[tuple[float, int, int]] = []

    def step_input(self) -> StepInput:
        """The newest token of the chain, behind those that are staged."""
        return StepInput(self.sequence.slot, [self.chain[-1]], [len(self.chain) - 2])

    def take(self, scores: torch.Tensor) -> bool:
        """Go on by the scores [V] behind the newest token; returns whether to go on further."""
        try:
            shares, token = self._next(scores)
        except Exception:
            # nothing may follow these drafts; if they come true, the verifier says so
            return False
        depth = len(self.chain)
        sure = float(shares.max())
        width = next(width for least, width in _WIDTHS if sure > least or not least)
        top = shares.topk(min(width, len(shares)))
        for share, other in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            if other != token and share > 0:
                self._beside.append((self._reach * share, depth, other))
        self._reach *= sure
        self.chain.append(token)
        return len(self.chain) <= self.depth and sure >= self.least

    def _next(self, scores: torch.Tensor) -> tuple[torch.Tensor, int]:
        """How likely each token is next, and the one that is drafted."""
        sampler, drafts = self.sequence.sampler, self.chain[1:]
        if sampler.greedy:
            shares = sampler.scores(scores, drafts).softmax(-1)
            return shares, int(shares.argmax())
        shares = sampler.probabilities(scores, drafts)
        return shares, sampler.draw(shares, self._numbers[len(drafts)])

    def tree(self) -> TokenTree:
        """The chain, and beside it what is likeliest, as many nodes as are wanted.

        The chain comes first: forms agree with their target far more often than either is sure.
        """
        room = self.budget.nodes + 1 - len(self.chain)
        beside = sorted(self._beside, key=lambda found: (-found[0], found[1]))[:room]
        tokens = (*self.chain, *(token for _, _, token in beside))
        # node d of the chain has depth d
        parents = (*range(-1, len(self.chain) - 1), *(depth - 1 for _, depth, _ in beside))
        return TokenTree(tokens, parents)
