"""A fixed budget of draft nodes, as most engines use."""

from __future__ import annotations

from collections.abc import Sequence

from linspec.config import check_size
from linspec.drafters.base import Drafter
from linspec.policy.base import POLICIES, Policy
from linspec.row import Row
from linspec.tree import Budget


@POLICIES.register("fixed", summary="the same number of draft nodes every round", paper="-")
class Fixed(Policy):
    """Always `nodes` draft nodes."""

    name = "fixed"

    def __init__(self, nodes: int) -> None:
        # 0 is plain decoding
        check_size("draft nodes", nodes, least=0)
        self.nodes = nodes

    def plan(self, rows: Sequence[Row], drafter: Drafter) -> list[Budget]:
        return [Budget.of(min(self.nodes, drafter.max_nodes))] * len(rows)
