"""Linear attention over groups: exact for the last few groups, a running sum over the groups before.

With group size G, g(t) = t // G and a span of n groups, t sees exactly the tokens of the groups
g(t) - n + 1 .. g(t), and S_t sums φ(k_s) v_sᵀ over all groups before them (float32). Groups are those of the
absolute position, so a token tree may cross one or several borders.

A linear mixer is an exact part, a summed part, and how the two become an output. A kernel other than the
mixer's own puts it in the *grouped arrangement*: the kernel's weights within the span, plus α times what the
mixer makes of the closed groups alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from linspec.decoding.tree_mask import TreeMask
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.base import Mixer
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.blocks import join
from linspec.mixers.ops.decayed import Decayed
from linspec.mixers.ops.exact import Exact, Groups, plain_weights, relu_squared, softmax_weights
from linspec.mixers.ops.features import unit
from linspec.mixers.ops.summed import Summed, to_blocks
from linspec.state.contract import LayerState, StateOptions
from linspec.state.grouped import GroupedSpec, GroupedState


class LinearMixer(Mixer):
    """Base of the linear mixers. What is a mixer's own:

    feature_map: φ of queries and keys alike. own_exact: its own weights within the span. make_summed: the
    part over closed groups, if there is one. sum_scale: the factor on that. finish: the last touch, such as
    a denominator. keeps_features: entries are features already, which are no wider than keys.
    """

    keeps_features: ClassVar[bool] = True
    summed: Summed | Decayed | None

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.groups = Groups(mixer.group, mixer.span)
        self.arranged = mixer.kernel != "own"
        self.maps_early = self.keeps_features and not self.arranged
        self.summed = self.make_summed()
        self.exact = arranged_exact(config, mixer) if self.arranged else self.own_exact()
        if self.arranged and self.summed is not None:
            # α = 0 at the start: with α = 1 the unnormalised sum drowns the exact part (You et al.
            # 2024, fig. 6b)
            self.alpha = nn.Parameter(torch.zeros(()))

    # ---- what a linear mixer defines

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """φ of queries and keys alike: [..., K] -> [..., S]."""
        return unit(x)

    def own_exact(self) -> Exact | None:
        """The mixer's own weights within the span: relu² of products of its features."""
        return self.feature_exact(relu_squared)

    def make_summed(self) -> Summed | Decayed | None:
        """The part over closed groups; None where they are forgotten."""
        if self.maps_early:
            return Summed(self.groups)
        return Summed(self.groups, self.summed_queries, self.summed_keys)

    def sum_width(self) -> int:
        """S, how many features keys have in the sums."""
        return self.head_width

    def sum_scale(self) -> torch.Tensor | float:
        """Factor on what closed groups give."""
        return self.alpha if self.arranged else 1.0

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        """Last touch on weighted sums of values [..., V'] -> [..., V], such as a denominator."""
        return o

    # ---- what follows from it

    def feature_exact(self, weights: Any) -> Exact:
        """Exact weights from products of the features that are summed too."""
        part = partial(plain_weights, of=weights)
        assert self.summed is None or isinstance(self.summed, Summed)
        if self.summed is None:
            return Exact(part)
        return Exact(part, self.summed.queries, self.summed.keys)

    def summed_queries(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become before they read the sums: [.., Hkv, rep, N, K'] -> [.., S]."""
        return self.feature_map(q)

    def summed_keys(self, k: torch.Tensor) -> torch.Tensor:
        """What keys become when their group closes into a sum: [.., Hkv, C, K'] -> [.., Hkv, C, S]."""
        return self.feature_map(k)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.feature_map(x) if self.maps_early else x

    def combine(self, exact: torch.Tensor | None, summed: torch.Tensor | None) -> torch.Tensor:
        """Outputs [..., V] from the value sums [..., V'] of both parts, one of which may not be there."""
        if exact is None or summed is None:
            both = self.sum_scale() * summed if summed is not None else exact
        elif self.arranged:
            return exact[..., : self.head_width] + self.sum_scale() * self.finish(summed)
        else:
            both = exact + self.sum_scale() * summed
        assert both is not None
        return self.finish(both)

    def grouped_plan(self, alpha: float) -> AttentionPlan | None:
        """The C form of squared or softmax weights within the span, unit features in the sums."""
        mixer = self.mixer
        if mixer.kernel not in ("own", "softmax") or self.relative is not None:
            return None
        return AttentionPlan(0, mixer.group, mixer.span, mixer.kernel == "own", alpha)

    # ---- state

    def state_spec(self) -> GroupedSpec:
        return GroupedSpec(
            kv_heads=self.kv_heads,
            key_width=self.head_width,
            value_width=self.head_width,
            conv_history=max(0, self.mixer.taps - 1),
            group=self.mixer.group,
            span=self.mixer.span,
            sum_width=self.sum_width() if self.summed is not None else 0,
        )

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        return GroupedState(self.state_spec(), [each.fold for each in layers], slots, options)

    def fold(self, sums: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sums [Hkv, S, Z] after entries of keys [Hkv, C, K'] and values [Hkv, C, V'] have closed."""
        assert self.summed is not None, "nothing is folded where nothing is summed"
        return self.summed.fold(sums, keys, values)

    # ---- the forms

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        seen, closed = self.groups.masks(tree_mask)
        exact = summed = None
        if self.exact is not None:
            bias = None
            if self.relative is not None:
                bias = self.relative.nodes(tree_mask, self.kv_heads)
            exact = self.exact.nodes(q, keys, values, seen, bias)
        if sums is not None and self.summed is not None:
            summed = self.summed.nodes(q, keys, values, tree_mask, closed, sums)
        return self.combine(exact, summed).unflatten(2, q.shape[2:4])

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        heads = q.unflatten(1, (self.kv_heads, self.repeats))
        exact = summed = None
        if self.exact is not None:
            blocks, keys = (
                to_blocks(self.exact.queries(heads), self.groups.size),
                self.exact.keys(k),
            )
            exact = self.exact.blocks(blocks, keys, v, self.groups, self._bias(blocks.shape[2]))
            if isinstance(self.summed, Summed) and self.summed.queries == self.exact.queries:
                # one map serves both parts
                summed = self.summed.read_blocks(blocks, keys, v, sums)
        if summed is None and self.summed is not None:
            summed = self.summed.blocks(heads, k, v, sums)
        return join(self.combine(exact, summed), self.repeats, q.shape[2])

    def _bias(self, blocks: int) -> torch.Tensor | None:
        """The relative bias of `Exact.blocks`."""
        if self.relative is None:
            return None
        before = self.groups.before(blocks)
        return self.relative.blocks(
            self.groups.size, before + self.groups.size, before, self.kv_heads
        )

    def mix_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Every token sees span - 1 groups to either side exactly, and the others as a sum."""
        heads = q.unflatten(1, (self.kv_heads, self.repeats))
        if real is None:
            real = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
        exact = summed = None
        if self.exact is not None:
            blocks = to_blocks(self.exact.queries(heads), self.groups.size)
            keys, bias = self.exact.keys(k), self._bias_both()
            exact = self.exact.blocks_both(blocks, keys, v, real, self.groups, bias)
        if isinstance(self.summed, Summed):
            summed = self.summed.blocks_both(heads, k, v, alone=exact is None)
        return join(self.combine(exact, summed), self.repeats, q.shape[2])

    def _bias_both(self) -> torch.Tensor | None:
        """The relative bias of `Exact.blocks_both`."""
        if self.relative is None:
            return None
        group, reach = self.groups.size, (self.groups.span - 1) * self.groups.size
        return self.relative.blocks(group, group + 2 * reach, reach, self.kv_heads)


def arranged_exact(config: StackConfig, mixer: MixerConfig) -> Exact:
    """The exact part of the grouped arrangement, on the keys of the pretrained model."""
    width = partial(_first, width=config.head_width)
    if mixer.kernel == "softmax":
        weights = partial(softmax_weights, scale=config.score_scale, cap=config.score_cap)
        return Exact(weights, width, width)
    unit_width = partial(_first_unit, width=config.head_width)
    return Exact(partial(plain_weights, of=relu_squared), unit_width, unit_width)


def _first(x: torch.Tensor, *, width: int) -> torch.Tensor:
    """The key of an entry, without gates that stand behind it."""
    return x[..., :width]


def _first_unit(x: torch.Tensor, *, width: int) -> torch.Tensor:
    return unit(x[..., :width])
