"""Mixers over groups of tokens, which say what becomes of a group when it closes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from linspec.kernels.gpu.fading import Fading
from linspec.kernels.gpu.reads import device_read
from linspec.mixers.base import Mixer
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.exact import Groups
from linspec.state.contract import LayerState, StateOptions
from linspec.state.grouped import GroupedSpec, GroupedState


class ClosingMixer(Mixer):
    """Base of the mixers whose groups close: into a matrix per KV head, of sums or of rows that are kept.

    With group size G, g(t) = t // G and a span of n groups, t sees exactly the tokens of the groups
    g(t) - n + 1 .. g(t). Groups are those of the absolute position, so a token tree may cross one or
    several borders.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.groups = Groups(mixer.group, mixer.span)

    def sum_width(self) -> int:
        """Rows of the matrix that groups close into; 0 forgets them."""
        raise NotImplementedError

    def sum_columns(self) -> int:
        """Columns of that matrix; 0 for as many as values have."""
        return 0

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sums [Hkv, S, Z] after entries of keys [Hkv, C, K'] and values [Hkv, C, V'] have closed."""
        raise NotImplementedError

    def state_spec(self) -> GroupedSpec:
        return GroupedSpec(
            kv_heads=self.kv_heads,
            key_width=self.head_width,
            value_width=self.head_width,
            conv_history=max(0, self.mixer.taps - 1),
            group=self.mixer.group,
            span=self.mixer.span,
            sum_width=self.sum_width(),
            sum_columns=self.sum_columns(),
        )

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        fadings: list[Fading | None] = []
        if options.kernels is not None:
            reads = [device_read(each.attention_plan()) for each in layers]
            fadings = [None if read is None else read.summed for read in reads]
        folds = [each.fold for each in layers]
        return GroupedState(self.state_spec(), folds, slots, options, fadings=fadings)
