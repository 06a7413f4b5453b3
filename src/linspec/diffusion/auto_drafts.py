"""FreeDave with as many drafts as pay: by what forwards cost here, and how often drafts come true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from linspec.diffusion.base import VERIFIES, StepCost
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.forward_costs import ForwardCosts
from linspec.diffusion.freedave import PAPER, FreeDave
from linspec.policies.calibration import Calibration
from linspec.utils.options import option
from linspec.utils.sizes import check_size

# what a draft must gain: costs are known to a few percent, and decisions cost something too
_GAIN = 1.05
# a size that was not seen yet is tried with drafts that are at least so likely, after so many rounds without
# drafts, and one that was too dear after more of them: other work may have made it so
_LIKELY, _FIRST, _AGAIN = 2 / 3, 64, 256
# rounds in which nothing is asked once not even a draft that is certain would pay, since to ask costs time as
# well; what plain forwards cost is looked at in the last ones
_REST, _LOOK = 32, 4


@dataclass(frozen=True, slots=True)
class AutoDraftsOptions:
    """How far a forward may look ahead."""

    most: int = option(
        "canvases of a forward at most, the true one included", default=4, short=True
    )

    def __post_init__(self) -> None:
        check_size("most", self.most)


@VERIFIES.register(
    "auto",
    summary="freedave with as many drafts as pay, by measured costs; none where none do",
    paper=PAPER,
    options=AutoDraftsOptions,
    lossless="yes",
)
class AutoDrafts(FreeDave):
    """A draft is computed along if rounds then come sooner.

    With e rounds expected of a forward of c seconds, a draft that comes true with probability q, and makes
    the forward last d seconds, pays if (e + q) / d > e / c. Seconds are those of the forwards that ran, in
    a batch as if all of its sequences had as many drafts; q is how sure the model was, corrected by how often
    such drafts came true.
    """

    options: AutoDraftsOptions  # type: ignore[assignment]  # its own, where FreeDave has others

    def __init__(self, options: AutoDraftsOptions) -> None:
        super().__init__(options)
        self.costs, self.calibration = ForwardCosts(), Calibration()
        # rounds since there were drafts, and rounds to come in which none are asked about
        self._sequences, self._plain, self._rest = 1, 0, 0

    @property
    def most_drafts(self) -> int:
        return self.options.most - 1

    @property
    def observes(self) -> bool:
        return self._rest <= _LOOK

    def ahead(self, canvas: Canvas) -> int:
        self._plain += 1
        if self._rest:
            self._rest -= 1
            return 0
        return self.most_drafts

    def tries(self, sures: Sequence[float], rows: int) -> bool:
        rows *= self._sequences
        before, after = self.costs(len(sures) * rows), self.costs((len(sures) + 1) * rows)
        if before is None:
            return False
        if after is None and self._plain < _FIRST:
            # nothing is tried before, however likely it is
            self._rest = _FIRST - self._plain
            return False
        chances = list(self._chances(sures))
        if after is None:
            return chances[-1] >= _LIKELY
        if len(sures) == 1:
            self.price = after / before
            self._rest = 0 if _GAIN * self.price < 2 else _REST
        rounds = 1 + sum(chances[:-1])
        if (rounds + chances[-1]) * before > _GAIN * rounds * after:
            return True
        return chances[-1] >= _LIKELY and self._plain >= _AGAIN

    def judged(self, sures: Sequence[float], followed: int) -> None:
        self._plain = 0
        for depth, sure in enumerate(_steps(sures)[: followed + 1], 1):
            self.calibration.observe(depth, sure, depth <= followed)

    def observe(self, cost: StepCost) -> None:
        self._sequences = cost.sequences
        self.costs.observe(cost.positions, cost.seconds)

    def _chances(self, sures: Sequence[float]) -> Iterator[float]:
        """How likely each draft comes true, and so all before it."""
        chance = 1.0
        for depth, sure in enumerate(_steps(sures), 1):
            chance *= self.calibration(depth, sure)
            yield chance


def _steps(sures: Sequence[float]) -> list[float]:
    """How sure each draft is once the one before it has come true."""
    return [sure / before if before else 0.0 for before, sure in pairwise((1.0, *sures))]
