"""Choose the tree that maximizes tokens per second (goodput, Liu et al. 2024, arXiv 2406.14066).

Four parts, none of which reads a clock or knows a model:

- `CostModel`: what a round costs here, by a curve measured once and the rounds that ran;
- `AcceptanceModel`: what drafts bring each request, against what the drafter expects;
- `choose`, the planner: from costs and acceptance to a size of tree for each request;
- `Exploration`: when a drafter that was switched off is tried again.

0 drafts is a candidate like any other, so a drafter that does not pay is switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import NO_DRAFTS, Budget
from linspec.drafters.base import Drafter
from linspec.policies.acceptance import AcceptanceModel
from linspec.policies.base import POLICIES, Policy, PolicyContext, RoundTimes
from linspec.policies.cost_model import CostModel
from linspec.policies.costs import CostCurve, load_or_measure
from linspec.policies.exploration import Exploration
from linspec.policies.planner import choose, next_size, sizes_up_to

# while every round drafts, plain rounds are looked at again this often
_PLAIN_ROUNDS = 64
# a new request is looked at again after 1, 2, 4 and from then on every 8 rounds
_REPLAN_ROUNDS = 8
# drafts of a first plan and of an attempt; later plans may double what was tried, whose cost is then known
_FIRST_NODES = 4


@dataclass(slots=True)
class _Plan:
    """What one request gets until it is planned again.

    age: rounds since it was planned, which happens every `wait` rounds. whole: all its drafts since then
    were accepted.
    """

    nodes: int = 0
    age: int = 1
    wait: int = 1
    whole: bool = False


@POLICIES.register(
    "auto",
    summary="the tree with the most tokens per second by a measured cost curve, 0 nodes included",
    paper="Liu et al. 2024 (SmartSpec), arXiv 2406.14066",
)
class Auto(Policy):
    """Budgets that maximize predicted goodput of the whole batch."""

    @classmethod
    def build(cls, context: PolicyContext) -> Self:
        """By the costs of the target on this machine, measured if they are not known."""
        return cls(load_or_measure(context.target))

    def __init__(self, costs: CostCurve) -> None:
        self.costs = CostModel(costs)
        self.acceptance = AcceptanceModel()
        self.exploration = Exploration()
        self._plans: dict[int, _Plan] = {}
        self._hopeful = True
        # the first round is plain
        self._since_plain = _PLAIN_ROUNDS

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        self._since_plain += 1
        if self._since_plain > _PLAIN_ROUNDS:
            self._since_plain = 0
            return [NO_DRAFTS] * len(sequences)
        slots = [sequence.slot for sequence in sequences]
        for slot in slots:
            self._begin(slot)
        if any(self._plans[slot].age >= self._plans[slot].wait for slot in slots):
            self._choose(slots, drafter)
        return [Budget.of(self._nodes(slot)) for slot in slots]

    def _begin(self, slot: int) -> None:
        if slot not in self._plans:
            self._plans[slot] = _Plan()
            self.acceptance.began(slot)
            self.exploration.began(slot)

    def _nodes(self, slot: int) -> int:
        """What was planned for a request, or now and then a small tree where that was nothing."""
        plan = self._plans[slot]
        plan.age += 1
        if plan.nodes:
            return plan.nodes
        return _FIRST_NODES if self.exploration.due(slot, self._hopeful) else 0

    def _choose(self, slots: Sequence[int], drafter: Drafter) -> None:
        """Plan the requests together."""
        most = min(drafter.max_nodes, max(_FIRST_NODES, 2 * self.costs.largest))
        gains = {nodes: drafter.expected(Budget.of(nodes)) for nodes in sizes_up_to(most)}
        choice = choose([self.acceptance.ratio(slot) for slot in slots], gains, self.costs)
        self._hopeful = choice.hopeful
        for slot, nodes in zip(slots, choice.nodes, strict=True):
            plan = self._plans[slot]
            plan.age, plan.wait = 0, min(2 * plan.wait, _REPLAN_ROUNDS)
            plan.nodes = self._stretched(plan, nodes, most) if nodes else 0
            plan.whole = True
            if nodes:
                self.exploration.planned(slot)

    def _stretched(self, plan: _Plan, nodes: int, most: int) -> int:
        """`nodes`, or a size never tried yet when smaller trees were accepted whole."""
        larger = next_size(nodes)
        untried = self.costs.largest < larger <= most
        return larger if untried and plan.whole and plan.nodes else nodes

    def observe(
        self, sequence: RunningSequence, drafted: int, accepted: int, expected: float
    ) -> None:
        plan = self._plans.get(sequence.slot)
        if plan is None or not drafted:
            return
        self.acceptance.observe(sequence.slot, accepted, expected)
        plan.whole &= accepted == drafted
        if accepted and not plan.nodes:
            # the attempt was worth it: plan again in the next round
            self.exploration.succeeded(sequence.slot)
            plan.age = _REPLAN_ROUNDS

    def observe_round(self, times: RoundTimes) -> None:
        self.costs.observe(times)

    def release(self, slot: int) -> None:
        self._plans.pop(slot, None)
        self.acceptance.release(slot)
        self.exploration.release(slot)
