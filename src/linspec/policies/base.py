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
    step, such as verifying and committing. cached: tokens of all sequences that were there before.
    """

    draft: float
    step: float
    nodes: int
    drafts: int = 0
    rest: float = 0.0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is made for.

    Attributes:
        target: the model that verifies.
    """

    target: CausalModel


class Policy(ABC):
    """Decides how large a tree each sequence gets in each round; made like a Drafter.

    A budget without draft nodes is legal: the round is then plain decoding.

    Attributes:
        name: under which it is registered.
    """

    name: ClassVar[str]
    # plain rounds that the latest round with drafts cost, as far as is known
    price: float | None = None

    def __init__(self, context: PolicyContext | None = None, options: Any = None) -> None:
        """Keep nothing; a policy keeps what it needs of them."""

    @abstractmethod
    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        """The largest tree of each sequence in the next round.

        The engine bounds the depth by the tokens that the request may still emit and the positions that the
        model still has. It leaves the number of nodes alone.
        """

    def keep(self, sequence: RunningSequence, tree: TokenTree) -> int:
        """How many draft nodes of a proposed tree to verify: the first ones. The default is all of them.

        The engine asks only if the rule of the verifier allows it: see `Verifier`.
        """
        return len(tree) - 1

    def observe(
        self, sequence: RunningSequence, drafted: int, accepted: int, expected: float
    ) -> None:
        """Learn from one sequence: draft nodes, how many were accepted, how many were expected."""

    def observe_round(self, times: RoundTimes) -> None:
        """Learn the seconds of one round. Rounds that also read prompt tokens are not reported."""

    def release(self, slot: int) -> None:
        """The request in `slot` has ended; forget what was kept for it."""


POLICIES: Registry[Policy] = Registry(
    "policy", "linspec.policies", beside=("a number of draft nodes",), base=Policy
)
"""The registry of policies. Packages add to it by entry points of the group `linspec.policies`."""
