"""Choose the tree that maximises tokens per second (goodput, Liu et al. 2024, arXiv 2406.14066).

A tree of n drafts is worth (1 + accepted(n)) / (step(n + 1) + draft + rest). The step's cost comes from
a curve measured on this machine and model, corrected by the rounds as they run; the rest is what every
round costs beside its step, much of it with a small model; the accepted tokens come from the drafter's
own estimate, corrected per request. 0 drafts is a candidate like any other, so a
drafter that does not pay is switched off; it is tried again at growing intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from linspec.drafters.base import Drafter
from linspec.policy.base import POLICIES, Policy, PolicyContext, RoundTimes
from linspec.policy.costs import CostCurve, load_or_measure
from linspec.row import Row

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
_FORGET = 0.9
_PRIOR = 1.0
# how fast plain rounds are learned from, and how much longer than expected one may take to be believed
_PLAIN_RATE, _SPIKE = 0.1, 2.0
# while every round drafts, plain rounds are looked at again this often
_PLAIN_ROUNDS = 64
# speculation has to promise this much more than plain decoding before it is used
_MARGIN = 1.03
# a new request is looked at again after 1, 2, 4 and from then on every 8 rounds
_REPLAN_ROUNDS = 8
# drafts of a first plan; later ones may double what was tried, whose cost is then known
_FIRST_NODES = 4
_FIRST_PATIENCE, _LAST_PATIENCE = 16, 512


@dataclass(slots=True)
class _Record:
    """What one request's drafts brought, against what was expected of them."""

    prior: float = 1.0
    accepted: float = 0.0
    expected: float = 0.0
    budget: int = 0
    age: int = 1
    wait: int = 1
    whole: bool = False
    idle: int = 0
    patience: int = _FIRST_PATIENCE

    def ratio(self) -> float:
        return (self.accepted + _PRIOR * self.prior) / (self.expected + _PRIOR)

    def add(self, accepted: float, expected: float) -> None:
        self.accepted = _FORGET * self.accepted + accepted
        self.expected = _FORGET * self.expected + expected


@dataclass(slots=True)
class _DraftCost:
    """Seconds that n drafts add to a round beside its step, a + b·n: a line through the rounds so far,
    old ones fading."""

    weight: float = 0.0
    nodes: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0
    slope: float = 0.0
    largest: int = 0

    def observe(self, nodes: int, seconds: float) -> None:
        self.largest = max(self.largest, nodes)
        self.weight = _FORGET * self.weight + 1
        self.nodes = _FORGET * self.nodes + nodes
        self.squares = _FORGET * self.squares + nodes * nodes
        self.seconds = _FORGET * self.seconds + seconds
        self.products = _FORGET * self.products + nodes * seconds
        mean = self.nodes / self.weight
        variance = self.squares / self.weight - mean * mean
        # rounds of one size say nothing about the slope: keep what is known of it
        if variance > 0.5:
            both = self.products / self.weight - mean * self.seconds / self.weight
            self.slope = max(0.0, both / variance)

    def __call__(self, nodes: int) -> float:
        if not self.weight:
            return 0.0
        mean = self.seconds / self.weight
        return max(0.0, mean + self.slope * (nodes - self.nodes / self.weight))


@POLICIES.register(
    "auto",
    summary="the tree with the most tokens per second by a measured cost curve, 0 nodes included",
    paper="Liu et al. 2024 (SmartSpec), arXiv 2406.14066",
)
class Auto(Policy):
    """Budgets that maximise predicted goodput of the whole batch."""

    @classmethod
    def build(cls, context: PolicyContext) -> Self:
        """By the costs of the target on this machine, measured if they are not known."""
        return cls(load_or_measure(context.target))

    def __init__(self, costs: CostCurve) -> None:
        self.costs = costs
        self._records: dict[int, _Record] = {}
        self._overall = _Record()
        self._hope = True
        self._drift = 1.0
        self._draft = _DraftCost()
        # seconds of a plain round beside its step
        self._rest = 0.0
        # the first round is plain
        self._since_plain = _PLAIN_ROUNDS

    def plan(self, rows: Sequence[Row], drafter: Drafter) -> list[int]:
        self._since_plain += 1
        if self._since_plain > _PLAIN_ROUNDS:
            self._since_plain = 0
            return [0] * len(rows)
        # a new request starts from what the drafter brought in others, and as patient
        prior, patience = self._overall.ratio(), self._overall.patience
        records = [
            self._records.setdefault(row.slot, _Record(prior, patience=patience)) for row in rows
        ]
        if any(record.age >= record.wait for record in records):
            self._choose(records, drafter)
        budgets = []
        for record in records:
            record.age += 1
            budgets.append(record.budget or self._probe(record))
        return budgets

    def _choose(self, records: list[_Record], drafter: Drafter) -> None:
        """Best (size of tree, rows that get one): rows with the best record come first."""
        ranked = sorted(records, key=_Record.ratio, reverse=True)
        plain = len(ranked) / self._round(len(ranked))
        best, best_nodes, best_rows = plain * _MARGIN, 0, 0
        self._hope = False
        most = min(drafter.max_nodes, max(_FIRST_NODES, 2 * self._draft.largest))
        for nodes in (n for n in CANDIDATES if n <= most):
            gain, tokens = drafter.expected(nodes), float(len(ranked))
            for rows, record in enumerate(ranked, 1):
                tokens += min(record.ratio() * gain, nodes)
                seconds = self._round(len(ranked) + rows * nodes) + self._draft(nodes)
                self._hope |= (len(ranked) + rows * nodes) / seconds > plain * _MARGIN
                if tokens / seconds > best:
                    best, best_nodes, best_rows = tokens / seconds, nodes, rows
        for rank, record in enumerate(ranked):
            record.age, record.wait = 0, min(2 * record.wait, _REPLAN_ROUNDS)
            record.budget = self._stretched(record, best_nodes, most) if rank < best_rows else 0
            if record.budget:
                record.idle = 0
                record.patience = self._overall.patience = _FIRST_PATIENCE
            record.whole = True

    def _stretched(self, record: _Record, nodes: int, most: int) -> int:
        """`nodes`, or a size never tried yet when smaller trees were accepted whole."""
        larger = next((n for n in CANDIDATES if n > nodes), nodes)
        untried = self._draft.largest < larger <= most
        return larger if untried and record.whole and record.budget else nodes

    def _probe(self, record: _Record) -> int:
        """A small tree once in a while, so that a drafter can earn its place back."""
        record.idle += 1
        # when not even perfect drafts would pay, only the costs are looked at again
        if record.idle < (record.patience if self._hope else _LAST_PATIENCE):
            return 0
        record.idle, record.patience = 0, min(2 * record.patience, _LAST_PATIENCE)
        self._overall.patience = max(self._overall.patience, record.patience)
        return 4

    def _round(self, nodes: int) -> float:
        """Seconds of a round over `nodes` nodes, without what drafts add."""
        return self._drift * self.costs(nodes) + self._rest

    def observe(self, row: Row, drafted: int, accepted: int, expected: float) -> None:
        record = self._records.get(row.slot)
        if record is None or not drafted:
            return
        record.add(accepted, expected)
        self._overall.add(accepted, expected)
        record.whole &= accepted == drafted
        if accepted and not record.budget:
            record.patience, record.age = _FIRST_PATIENCE, _REPLAN_ROUNDS

    def observe_round(self, times: RoundTimes) -> None:
        curve = self.costs(times.nodes)
        known = self._draft(times.drafts) if times.drafts else 0.0
        # a round that took far longer than it should have met something else
        step = min(times.step, _SPIKE * (self._drift * curve + known))
        if not times.drafts:
            rest = min(times.rest, _SPIKE * self._rest or times.rest)
            self._drift += _PLAIN_RATE * (step / curve - self._drift)
            self._rest += (_PLAIN_RATE if self._rest else 1.0) * (rest - self._rest)
        else:
            # drafting also pushes weights out of the caches, and trees take longer to verify and commit
            more = step - self._drift * curve + times.rest - self._rest
            self._draft.observe(times.drafts, times.draft + more)

    def release(self, slot: int) -> None:
        self._records.pop(slot, None)
