"""A fixed budget of draft nodes, as most engines use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget
from linspec.drafters.base import MAX_NODES, Drafter
from linspec.errors import ConfigError
from linspec.policies.base import POLICIES, Policy, PolicyContext
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class FixedOptions:
    """How many draft nodes."""

    nodes: int = option("draft nodes of every tree; 0 is plain decoding", short=True)

    def __post_init__(self) -> None:
        _check(self.nodes)


@POLICIES.register(
    "fixed",
    summary="the same number of draft nodes every round",
    paper="-",
    options=FixedOptions,
)
class Fixed(Policy):
    """Always `nodes` draft nodes."""

    def __init__(self, nodes: int) -> None:
        _check(nodes)
        self.nodes = nodes

    @classmethod
    def build(cls, context: PolicyContext, options: FixedOptions) -> Self:
        """The policy of a spec, such as fixed:12."""
        return cls(options.nodes)

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        return [Budget.of(min(self.nodes, drafter.max_nodes))] * len(sequences)


def _check(nodes: int) -> None:
    """Raise ConfigError for what no tree can have; 0 is plain decoding."""
    check_size("draft nodes", nodes, least=0)
    if nodes > MAX_NODES:
        raise ConfigError(
            f"a tree holds at most {MAX_NODES} draft nodes, got {nodes}; ask for fewer, or for auto"
        )
