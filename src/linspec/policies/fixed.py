"""A fixed budget of draft nodes, as most engines use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget
from linspec.drafters.base import Drafter
from linspec.policies.base import POLICIES, Policy, PolicyContext
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class FixedOptions:
    """How many draft nodes."""

    nodes: int = option("draft nodes of every tree; 0 is plain decoding", short=True)

    def __post_init__(self) -> None:
        check_size("draft nodes", self.nodes, least=0)


@POLICIES.register(
    "fixed",
    summary="the same number of draft nodes every round",
    paper="-",
    options=FixedOptions,
)
class Fixed(Policy):
    """Always `nodes` draft nodes."""

    def __init__(self, nodes: int) -> None:
        # 0 is plain decoding
        check_size("draft nodes", nodes, least=0)
        self.nodes = nodes

    @classmethod
    def build(cls, context: PolicyContext, options: FixedOptions) -> Self:
        """The policy of a spec, such as fixed:12."""
        return cls(options.nodes)

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        return [Budget.of(min(self.nodes, drafter.max_nodes))] * len(sequences)
