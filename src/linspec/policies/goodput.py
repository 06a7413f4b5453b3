"""Choose the tree that maximizes tokens per second (goodput, Liu et al. 2024, arXiv 2406.14066).

Four parts, none of which reads a clock or knows a model:

- `CostModel`: what a round costs here, by a curve measured once and the rounds that ran;
- `AcceptanceModel`: what drafts bring each request, against what the drafter expects;
- `choose`, the planner: from costs and acceptance to a size of tree for each request;
- `Exploration`: when a drafter that was switched off is tried again.

0 drafts is a candidate like any other, so a drafter that does not pay is switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import NO_DRAFTS, Budget
from linspec.drafters.base import Drafter
from linspec.policies.acceptance import AcceptanceModel, Steps
from linspec.policies.base import POLICIES, Policy, PolicyContext, RoundTimes
from linspec.policies.cost_model import CostModel
from linspec.policies.costs import CostCurve, doubt, load_or_measure
from linspec.policies.exploration import Exploration
from linspec.policies.planner import affordable, choose, next_size, sizes_up_to, steps_of

# rounds after which requests are planned again although nothing was learned
_IDLE_ROUNDS = 64
# a new request is looked at again after 1, 2 and from then on every 4 rounds
_REPLAN_ROUNDS = 4
# drafts of a first plan and of an attempt; later plans may double what was tried, whose cost is then known
_FIRST_NODES = 2
# how fast the share of trees that have drafts is forgotten
_FOUND_FORGET = 0.95
# seconds of a choice for one request more, and the share of the time that choices may take
_CHOICE_SECONDS, _CHOICE_SHARE = 2e-5, 0.01


@dataclass(slots=True)
class _Plan:
    """What one request gets until it is planned again.

    sizes: drafts after a tree with a rejection, and after one that was accepted whole: a text that is copied
    goes on being copied. flows: which of them is next. age: rounds since it was planned, which happens every
    `wait` rounds. whole: all its drafts since then were accepted. again: drafts of an attempt in which the
    drafter could only begin to draft.
    """

    sizes: tuple[int, int] = (0, 0)
    flows: bool = False
    age: int = 1
    wait: int = 1
    whole: bool = False
    again: int = 0

    @property
    def nodes(self) -> int:
        """Drafts of the next tree."""
        return self.sizes[self.flows]


@POLICIES.register(
    "goodput",
    summary="the tree with the most tokens per second by a measured cost curve, 0 nodes included",
    paper="Liu et al. 2024 (SmartSpec), arXiv 2406.14066",
)
class Goodput(Policy):
    """Budgets that maximize predicted goodput of the whole batch."""

    @classmethod
    def build(cls, context: PolicyContext) -> Self:
        """By the costs of the target on this machine, measured if they are not known."""
        return cls(load_or_measure(context.target), lambda: doubt(context.target))

    def __init__(self, costs: CostCurve, doubted: Callable[[], None] | None = None) -> None:
        """doubted: called once if the rounds contradict `costs`."""
        self.costs, self._doubted = CostModel(costs), doubted
        # after a rejection, and after a tree that was accepted whole
        self.acceptance = (AcceptanceModel(), AcceptanceModel())
        self.exploration = Exploration()
        self._plans: dict[int, _Plan] = {}
        self._hopeful = True
        # times that the requests were planned, and the rounds since; whether anything was learned since
        self.choices = 0
        self._since_choice, self._news = 0, True
        self._steps: Steps = ()
        # whether any tree was accepted whole
        self._flowed = False
        # what most requests got, and so the next one
        self._usual = (0, 0)
        # share of the trees asked for that had drafts, and how many were asked for in this round
        self._found, self._asked, self._had = 1.0, 0, 0
        # the largest attempt that can be afforded
        self._attempt = 0

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        self.exploration.earned()
        self.costs.count, self._asked = len(sequences), 0
        if self.costs.wants_plain():
            return [NO_DRAFTS] * len(sequences)
        slots = [sequence.slot for sequence in sequences]
        for slot in slots:
            self._begin(slot)
        self._since_choice += 1
        if self._may_choose(slots):
            self._choose(slots, drafter)
        budgets = [Budget.of(self._nodes(slot, drafter)) for slot in slots]
        self._asked = sum(budget.nodes > 0 for budget in budgets)
        return budgets

    def _begin(self, slot: int) -> None:
        if slot not in self._plans:
            self._plans[slot] = _Plan(self._usual)
            for model in self.acceptance:
                model.began(slot)
            self.exploration.began(slot)

    def _may_choose(self, slots: Sequence[int]) -> bool:
        """Whether a plan is old enough, something was learned since, and a choice is not too dear."""
        if not self._news and self._since_choice < _IDLE_ROUNDS:
            return False
        seconds = _CHOICE_SECONDS * (1 + len(slots)) / self.costs.round(len(slots))
        return self._since_choice * _CHOICE_SHARE >= seconds and any(
            self._plans[slot].age >= self._plans[slot].wait for slot in slots
        )

    def _nodes(self, slot: int, drafter: Drafter) -> int:
        """What was planned for a request, or now and then a small tree where that was nothing."""
        plan = self._plans[slot]
        plan.age += 1
        if plan.nodes:
            return plan.nodes
        if plan.again:
            again, plan.again = plan.again, 0
            return again
        # one attempt in a round
        if self._attempt and self.exploration.due(slot, self._hopeful):
            attempt, self._attempt = self._attempt, 0
            plan.again = attempt if drafter.probing else 0
            return attempt
        return 0

    def _choose(self, slots: Sequence[int], drafter: Drafter) -> None:
        """Plan the requests together."""
        self.choices += 1
        self._since_choice, self._news = 0, False
        most = min(drafter.max_nodes, max(_FIRST_NODES, 2 * self.costs.largest))
        sizes = sizes_up_to(most)
        self._steps = steps_of({nodes: drafter.expected(Budget.of(nodes)) for nodes in sizes})
        choices = [
            choose(
                [model.hardness(slot) for slot in slots],
                self._steps,
                sizes,
                self.costs,
                self._found,
            )
            for model in (self.acceptance if self._flowed else self.acceptance[:1])
        ]
        self._hopeful = choices[0].hopeful
        small = [nodes for nodes in sizes if nodes <= _FIRST_NODES]
        self._attempt = affordable(small, len(slots), self.costs, self.exploration.credit)
        chosen = list(zip(choices[0].nodes, choices[-1].nodes, strict=True))
        self._usual = sorted(chosen)[len(slots) // 2]
        for slot, both in zip(slots, chosen, strict=True):
            plan = self._plans[slot]
            plan.age, plan.wait = 0, min(2 * plan.wait, _REPLAN_ROUNDS)
            plan.sizes = (both[0], self._stretched(plan, both[1], most))
            plan.whole = True
            if plan.nodes:
                self.exploration.planned(slot)

    def _stretched(self, plan: _Plan, nodes: int, most: int) -> int:
        """`nodes`, or a size never tried yet when smaller trees were accepted whole."""
        larger = next_size(nodes)
        untried = self.costs.largest < larger <= most
        return larger if nodes and untried and plan.whole and plan.nodes else nodes

    def observe(
        self, sequence: RunningSequence, drafted: int, accepted: int, expected: float
    ) -> None:
        plan = self._plans.get(sequence.slot)
        if plan is None or not drafted:
            return
        self._had += 1
        model, planned = self.acceptance[plan.flows], plan.nodes
        model.observe(sequence.slot, self._steps, drafted, accepted, expected)
        plan.flows = accepted == drafted
        plan.whole &= plan.flows
        self._flowed |= plan.flows
        self._news = True
        if planned:
            return
        # an attempt: plan again in the next round
        self.exploration.tried(sequence.slot, self._price(drafted) - accepted / self.costs.count)
        plan.age = _REPLAN_ROUNDS

    def _price(self, drafts: int) -> float:
        """Plain rounds that drafts cost if none is accepted."""
        rounds = self.costs.round(self.costs.count + drafts) + self.costs.drafting(drafts)
        return rounds / self.costs.round(self.costs.count) - 1

    def observe_round(self, times: RoundTimes) -> None:
        self.costs.observe(times, asked=self._asked > 0)
        if times.drafts:
            self.price = self.costs.price(times)
        if self._doubted is not None and self.costs.contradicts:
            self._doubted()
            self._doubted = None
        if self._asked:
            rate = 1 - _FOUND_FORGET**self._asked
            self._found += rate * (max(self._had, 0.1) / self._asked - self._found)
        self._had = 0

    def release(self, slot: int) -> None:
        self._plans.pop(slot, None)
        for model in self.acceptance:
            model.release(slot)
        self.exploration.release(slot)
