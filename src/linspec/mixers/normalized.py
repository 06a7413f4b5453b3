"""What mixers with a denominator share: one more value column that is always 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from linspec.kernels.step_plan import SummedPlan
from linspec.mixers.linear import LinearMixer
from linspec.mixers.ops.exact import Exact
from linspec.mixers.ops.features import same
from linspec.mixers.ops.parts import weigh_features
from linspec.state.grouped import GroupedSpec

DENOMINATOR_FLOOR = 1e-6


class Normalized(LinearMixer):
    """o_t = Σ weight(t, s) v_s / (Σ weight(t, s) + ε).

    With a kernel for the exact part, each of the two parts has its own denominator.
    """

    def state_spec(self) -> GroupedSpec:
        return replace(super().state_spec(), value_width=self.head_width + 1)

    def entry_values(self, v: torch.Tensor) -> torch.Tensor:
        return F.pad(v, (0, 1), value=1.0)

    def quotient_plan(self, map_: str, exact: str = "products", **given: Any) -> SummedPlan | None:
        """`summed_plan` with the denominator."""
        end = {"end": "quotient", "floor": DENOMINATOR_FLOOR, "ones": True}
        return self.summed_plan(map_, exact, **end, **given)

    def own_exact(self) -> Exact | None:
        return weigh_features(self.summed, same)

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return o[..., :-1] / (o[..., -1:] + DENOMINATOR_FLOOR)
