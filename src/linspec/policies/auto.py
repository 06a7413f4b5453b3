"""The policy for whoever names none: the one that suits the drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.base import Drafter
from linspec.policies.base import POLICIES, Policy, PolicyContext, RoundTimes
from linspec.policies.costs import CostCurve, doubt, load_or_measure
from linspec.policies.goodput import Goodput
from linspec.policies.specdec_pp import SpecDecPP


@POLICIES.register(
    "auto",
    summary="specdec-pp where a drafter, or a part of it, says how sure it is of each draft, else goodput",
    paper="Liu et al. 2024 (SmartSpec), arXiv 2406.14066; Huang et al. 2024 (SpecDec++), arXiv 2405.19715",
)
class Auto(Policy):
    """Chosen when it is first asked, by the drafter that it plans for."""

    @classmethod
    def build(cls, context: PolicyContext) -> Self:
        """By the costs of the target on this machine, measured if they are not known."""
        return cls(load_or_measure(context.target), lambda: doubt(context.target))

    def __init__(self, costs: CostCurve, doubted: Callable[[], None] | None = None) -> None:
        """doubted: called once if the rounds contradict `costs`."""
        self._costs, self._doubted = costs, doubted
        self._chosen: Policy | None = None

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        if self._chosen is None:
            kind = SpecDecPP if drafter.confident or drafter.partly_free else Goodput
            self._chosen = kind(self._costs, self._doubted)
        return self._chosen.plan(sequences, drafter)

    def keep(self, sequence: RunningSequence, tree: TokenTree) -> int:
        return (
            super().keep(sequence, tree)
            if self._chosen is None
            else self._chosen.keep(sequence, tree)
        )

    def observe(
        self, sequence: RunningSequence, drafted: int, accepted: int, expected: float
    ) -> None:
        if self._chosen is not None:
            self._chosen.observe(sequence, drafted, accepted, expected)

    def observe_round(self, times: RoundTimes) -> None:
        if self._chosen is not None:
            self._chosen.observe_round(times)
            self.price = self._chosen.price

    def release(self, slot: int) -> None:
        if self._chosen is not None:
            self._chosen.release(slot)
