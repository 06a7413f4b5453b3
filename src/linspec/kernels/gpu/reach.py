"""How far back a node sees rows one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linspec.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Reach:
    """window: the nearest rows, 0 for all. group, span: rows of the last `span` groups of `group` rows, the
    open one included; 0 is one group of all rows. As in `AttentionPlan`."""

    window: int = 0
    group: int = 0
    span: int = 1

    def __post_init__(self) -> None:
        for name, least in (("window", 0), ("group", 0), ("span", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def oldest(self, positions: torch.Tensor) -> torch.Tensor:
        """The first position that nodes at `positions` see."""
        found = torch.zeros_like(positions)
        if self.window:
            found = (positions - self.window + 1).clamp_min(0)
        if self.group:
            groups = (positions // self.group - (self.span - 1)).clamp_min(0)
            found = found.maximum(groups * self.group)
        return found
