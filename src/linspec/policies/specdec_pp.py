"""Stop where a rejection is likely (SpecDec++, Huang et al. 2024, arXiv 2405.19715).

The paper drafts on until the chance that all drafts are accepted falls below a constant that the costs set.
Here a drafter that gives confidences (`TokenTree.confidences`) proposes a tree, and only the first nodes that
pay are verified: a node pays if it is accepted more often than its seconds would bring tokens elsewhere.
Confidences are calibrated as drafts are judged, the seconds are measured, and no threshold has to be tuned.

Drafts without a model are a matter of their own, in a mix too: what they cost is verifying them, and `keep`
decides about that (`FreeDrafts`). Those of a model have to earn what making them costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import NO_DRAFTS, Budget, TokenTree
from linspec.drafters.base import Drafter
from linspec.policies.base import POLICIES, Policy, PolicyContext, RoundTimes
from linspec.policies.calibration import Calibration
from linspec.policies.cost_model import CostModel
from linspec.policies.costs import CostCurve, doubt, load_or_measure
from linspec.policies.exploration import Exploration
from linspec.policies.free_drafts import FreeDrafts
from linspec.policies.means import FORGET, Mean
from linspec.policies.planner import affordable, sizes_up_to

_FIRST_NODES = 4
# how often the size to ask for is chosen anew, and how often where nothing was drafted meanwhile
_REPLAN_ROUNDS, _IDLE_ROUNDS = 8, 64
# rounds' worth of the assumption that drafting pays
_HOPE = 6.0


@POLICIES.register(
    "specdec-pp",
    summary="verifies the first drafts that pay by their calibrated confidences and the measured costs",
    paper="Huang et al. 2024 (SpecDec++), arXiv 2405.19715",
)
class SpecDecPP(Policy):
    """Trees that are cut where a rejection is likely.

    A drafter without confidences has its trees verified whole, of the size that it expects most from.
    """

    @classmethod
    def build(cls, context: PolicyContext) -> Self:
        """By the costs of the target on this machine, measured if they are not known."""
        return cls(load_or_measure(context.target), lambda: doubt(context.target))

    def __init__(self, costs: CostCurve, doubted: Callable[[], None] | None = None) -> None:
        """doubted: called once if the rounds contradict `costs`."""
        self._doubted = doubted
        self.costs, self.exploration = CostModel(costs), Exploration()
        # of a model's drafts; those without one are judged apart
        self.calibration, self.free = Calibration(), FreeDrafts()
        self._trees: dict[int, TokenTree] = {}
        self._size, self._age, self._news = 0, _REPLAN_ROUNDS, True
        # tokens and plain rounds' time of a round; what a round with drafts brings beyond a plain one
        self._tokens, self._rounds = Mean(1.0), Mean(1.0)
        self._surplus = Mean(0.5, _HOPE)
        self._share = Mean(1.0)
        self._asked, self._kept, self._accepted = 0, 0, 0
        # the slots that had drafts of a model in this round, kept or not
        self._drafted: set[int] = set()
        self._took_model: Callable[[RunningSequence], bool] | None = None

    @property
    def rate(self) -> float:
        """Tokens of a sequence in the time of a plain round, in the mean: what seconds bring elsewhere."""
        return max(1.0, self._tokens.value / self._rounds.value)

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        self.exploration.earned()
        self.costs.count = len(sequences)
        self._asked = self._kept = self._accepted = 0
        self._trees.clear()
        self._drafted.clear()
        self.free.begin()
        self._took_model = drafter.took_model
        for sequence in sequences:
            self.free.look_back(sequence)
            self.exploration.began(sequence.slot)
        if self.costs.wants_plain():
            return [NO_DRAFTS] * len(sequences)
        if drafter.confident and drafter.model_free:
            self._ask()
            return [Budget.of(self.free.room(sequence.slot)) for sequence in sequences]
        sizes = self._sizes(sequences, drafter)
        self._asked = sum(sizes)
        if drafter.partly_free:
            return self._mixed(sequences, sizes)
        return [Budget.of(size) for size in sizes]

    def _sizes(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[int]:
        """Drafts to ask each sequence for, of a model where there is one."""
        self._age += 1
        if self._age >= (_REPLAN_ROUNDS if self._news else _IDLE_ROUNDS):
            self._age, self._news, self._size = 0, False, self._best_size(drafter)
        if self._size and (drafter.model_free or self._surplus.value > 0):
            return [self._size] * len(sequences)
        return self._attempts(sequences, drafter)

    def _ask(self) -> None:
        self.free.ask(self.costs.asking() / self.costs.round(self.costs.count))

    def _mixed(self, sequences: Sequence[RunningSequence], sizes: Sequence[int]) -> list[Budget]:
        """Room for drafts without a model, and `sizes` for those of one."""
        self._ask()
        price = 0.0
        # an attempt is made for what it teaches
        if self._surplus.value > 0:
            drafting = self.costs.drafting(max(sizes))
            price = self.rate * drafting / self.costs.round(len(sequences))
        budgets = []
        for sequence, size in zip(sequences, sizes, strict=True):
            room = max(self.free.room(sequence.slot), size)
            budgets.append(Budget(room, room, size, price))
        return budgets

    def _best_size(self, drafter: Drafter) -> int:
        """The tree to ask for: what it brings, less its drafting and the part of it that is verified."""
        most, count = (
            min(drafter.max_nodes, max(_FIRST_NODES, 2 * self.costs.largest)),
            self.costs.count,
        )
        plain = self.costs.round(count)

        def worth(size: int) -> float:
            more = self._share.value * (self.costs.round(count + count * size) - plain)
            return (
                drafter.expected(Budget(size, size, model_nodes=size))
                - self.rate * (more + self.costs.drafting(size)) / plain
            )

        best = max(sizes_up_to(most), key=worth)
        # without a model, what is not worth verifying costs next to nothing
        hopeful = drafter.model_free or worth(best) > 0 or self._surplus.value > 0
        return best if hopeful else 0

    def _attempts(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[int]:
        """A small tree for one sequence now and then, while drafting does not pay."""
        sizes = [0] * len(sequences)
        due = (i for i, each in enumerate(sequences) if self.exploration.due(each.slot, True))
        first = next(due, None)
        if first is not None:
            small = sizes_up_to(min(drafter.max_nodes, _FIRST_NODES))
            sizes[first] = affordable(small, len(sequences), self.costs, self.exploration.credit)
        return sizes

    def keep(self, sequence: RunningSequence, tree: TokenTree) -> int:
        """The first nodes that bring most beyond what their seconds would bring elsewhere."""
        slot = sequence.slot
        free = self._took_model is not None and not self._took_model(sequence)
        (self.free.slots if free else self._drafted).add(slot)
        if tree.confidences is None:
            self._kept += len(tree) - 1
            return len(tree) - 1
        self._trees[slot] = tree
        kept = self._worth(tree, self.free.calibration if free else self.calibration)
        self._kept += kept
        if free:
            self.free.kept(sequence, tree, kept)
        return kept

    def _worth(self, tree: TokenTree, calibration: Calibration) -> int:
        """Nodes of a tree that are worth verifying."""
        assert tree.confidences is not None
        count, plain = self.costs.count + self._kept, self.costs.round(self.costs.count)
        before, reached = self.costs.round(count), [1.0]
        best, kept, tokens = 0.0, 0, 0.0
        for node in range(1, len(tree)):
            chance = calibration(tree.depths[node], tree.confidences[node])
            reached.append(reached[tree.parents[node]] * chance)
            tokens += reached[node]
            # the batch shares a round: its tokens are what the seconds would bring
            price = self.rate * self.costs.count * (self.costs.round(count + node) - before) / plain
            if tokens - price > best:
                best, kept = tokens - price, node
        return kept

    def observe(
        self, sequence: RunningSequence, drafted: int, accepted: int, expected: float
    ) -> None:
        self._accepted += accepted
        if sequence.slot in self.free.slots:
            return
        self._drafted.add(sequence.slot)
        tree = self._trees.get(sequence.slot)
        if tree is None or tree.confidences is None or not tree.shape.is_chain:
            return
        for depth in range(1, min(drafted, accepted + 1) + 1):
            self.calibration.observe(depth, tree.confidences[depth], depth <= accepted)

    def observe_round(self, times: RoundTimes) -> None:
        count, free = self.costs.count, bool(self.free.slots) and not self._drafted
        asked = self._asked > 0 or self.free.asked
        if asked and not times.drafts and times.nodes == count and self._trees:
            # drafted, and nothing kept: a plain step, and drafts that were made for nothing
            draft = times.draft if free else 0.0
            times = replace(times, draft=draft, drafts=0)
        self.costs.observe(times, asked=asked, free=free)
        if times.drafts:
            self.price = self.costs.price(times, free=free)
        if self._doubted is not None and self.costs.contradicts:
            self._doubted()
            self._doubted = None
        # a verifier that judges every draw keeps them all, and nobody is asked
        kept, spent, plain = times.nodes - count, 1.0, self.costs.round(count)
        if kept or self._drafted:
            spent = self.costs.round(times.nodes) / plain
        if self._drafted:
            spent += self.costs.drafting(max(1, self._asked // count)) / plain
        elif free and times.drafts:
            spent += self.costs.drafting(times.drafts, free=True) / plain
        elif self.free.asked:
            spent += self.costs.asking() / plain
        self._learn(kept, spent)
        self._tokens.add(1 + self._accepted / count)
        self._rounds.add(spent)

    def _learn(self, kept: int, spent: float) -> None:
        """What a round of `spent` plain rounds says about drafts of a model, or about those without one."""
        surplus = self._accepted / self.costs.count - (spent - 1)
        self._news |= bool(self._drafted or self.free.slots)
        if not self._drafted:
            if self.free.asked:
                self.free.learn(surplus)
            # what was found of a model's is believed ever less: an attempt may change it
            self._surplus.weight = max(1.0, FORGET * self._surplus.weight)
            return
        # a drafter may say of drafts without a model that one made them
        if self._asked:
            self._share.add(kept / self._asked)
        self._surplus.add(surplus)
        if not self._size or self._surplus.value <= 0:
            self._tried(-surplus)

    def _tried(self, price: float) -> None:
        for slot in self._drafted:
            self.exploration.tried(slot, price)

    def release(self, slot: int) -> None:
        self._trees.pop(slot, None)
        self.free.release(slot)
        self.exploration.release(slot)
