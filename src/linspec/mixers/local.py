"""FLASH-local attention (Hua et al. 2022): weights inside a group, nothing across."""

from __future__ import annotations

from linspec.kernels.step_plan import AttentionPlan, SummedPlan
from linspec.mixers.base import MIXERS
from linspec.mixers.linear import LinearMixer


@MIXERS.register(
    "local",
    summary="relu(q·k)² inside a group of tokens",
    paper="Hua et al. 2022 (FLASH), arXiv 2202.10447",
    state="2·n·G·d per KV head",
    cost="2·n·G·d per token",
)
class Local(LinearMixer):
    """o_t = sum over s <= t within the span of relu(q̂_t·k̂_s)² v_s, or of softmax weights."""

    biased = True

    def make_summed(self) -> None:
        return None

    def attention_plan(self) -> AttentionPlan | SummedPlan | None:
        return self.grouped_plan(0.0) if type(self) is Local else None
