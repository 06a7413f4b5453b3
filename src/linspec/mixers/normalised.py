"""What mixers with a denominator share: one more value column that is always 1."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from linspec.mixers.linear import GroupedLinear
from linspec.state.grouped import GroupedSpec

DENOMINATOR_FLOOR = 1e-6


class Normalised(GroupedLinear):
    """o_t = Σ weight(t, s) v_s / (Σ weight(t, s) + ε).

    With a kernel for the rows within reach, each of the two parts has its own denominator.
    """

    def state_spec(self) -> GroupedSpec:
        return replace(super().state_spec(), value_width=self.head_width + 1)

    def row_values(self, v: torch.Tensor) -> torch.Tensor:
        return F.pad(v, (0, 1), value=1.0)

    def in_group(self, products: torch.Tensor) -> torch.Tensor | None:
        return products

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return o[..., :-1] / (o[..., -1:] + DENOMINATOR_FLOOR)
