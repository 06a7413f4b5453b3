"""Who decides, before a round, how large a tree each sequence gets. No nodes are legal and truly plain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from linspec.decoding.protocols import CausalModel
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.base import Drafter
from linspec.utils.registry import Registry


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """Seconds of one round: drafting, and the target's step over `nodes` packed nodes of all sequences.

    drafts: draft nodes of the largest tree; 0 when nothing was drafted. rest: what came after the
    step, such as verifying and committing.
    """

    draft: float
    step: float
    nodes: int
    drafts: int = 0
    rest: float = 0.0


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is made for: the model that verifies."""

    target: CausalModel


class Policy(ABC):
    """Budgets of drafts, one per sequence and round; made like a drafter (see there)."""

    name: ClassVar[str]

    def __init__(self, context: PolicyContext | None = None, options: Any = None) -> None:
        """Keep nothing; a policy keeps what it needs of them."""

    @abstractmethod
    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        """The largest tree for each sequence's next round; the engine bounds its depth by its room."""

    def keep(self, sequence: RunningSequence, tree: TokenTree) -> int:
        """How many draft nodes of a proposed tree are verified, the first ones; all of them by default.

        Asked only where the verifier's rule allows it: see `Verifier.divides`.
        """
        return len(tree) - 1

    def observe(
        self, sequence: RunningSequence, drafted: int, accepted: int, expected: float
    ) -> None:
        """One sequence's outcome."""

    def observe_round(self, times: RoundTimes) -> None:
        """One round's timing; rounds that carry prefill are not reported."""

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""


POLICIES: Registry[Policy] = Registry(
    "policy", "linspec.policies", beside=("a number of draft nodes",)
)
