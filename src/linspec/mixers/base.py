"""What every mixer shares: its projections, and the way from the states of tokens through its forms and back.

A mixer is one function in two forms. The *full form* (`forward`) sees a whole sequence, is parallel
over time and differentiable. The *step form* (`step`) sees the new nodes of a step against the
committed state of their slots. In an encoder there is only a full form, without causality.

What a mixer says is in `contract.py`, what the forms make of it in `forms.py`. What a mixer is made of are
functions on tensors, in `ops/`; see CONTRIBUTING.md for a worked example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from linspec.errors import ConfigError
from linspec.kernels.step_plan import PartPlan
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.contract import MixerContract
from linspec.mixers.forms import full, full_both, step_both, step_long, step_nodes
from linspec.mixers.ops.convolution import pad_taps
from linspec.mixers.options import LinearOptions
from linspec.mixers.projections import HeadProjections
from linspec.mixers.relative import RelativeBias
from linspec.mixers.rope import rotate
from linspec.mixers.shards import Shard, full_of_shard
from linspec.state.canvas import CanvasEntries
from linspec.state.contract import EntryState, Makers
from linspec.utils.messages import quoted
from linspec.utils.registry import Registry

if TYPE_CHECKING:
    from linspec.state.dense_group import DenseGroup

Rope = tuple[torch.Tensor, torch.Tensor] | None
# queries, keys with what stands beside them, and kept values, of all tokens
Features = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
StepForm = Callable[..., torch.Tensor]


class Mixer(HeadProjections, MixerContract):
    """The part of a block through which a token sees other tokens, in two forms of one function.

    The full form (`forward`) computes a whole sequence, the step form (`step`) new tree nodes against the
    state of their slots. Both give the same outputs. A new mixer defines a few of the methods that it
    inherits from the contract; see `CONTRIBUTING.md`.

    Attributes:
        taps: of the convolution [H, W], where the mixer has one.
        padded_taps: what the nodes of a step need of them, once the weights are final.
        relative: the relative position bias, where the mixer and the backbone have one.
        shard: the part of a sequence that the full form computes, None for all of it; see `on_shard`.

    Raises:
        ConfigError: a size is set that this mixer does not have, or it does not fit the backbone.
    """

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config)
        check_settings(mixer)
        check_direction(type(self), config, mixer)
        self.config, self.mixer = config, mixer
        self.padded_taps: torch.Tensor | None = None
        self.relative: RelativeBias | None = None
        self.shard: Shard | None = None
        if self.biased and config.relative is not None:
            self.relative = RelativeBias(config.relative, self.heads, causal=config.causal)
        if mixer.taps:
            # zero taps: a converted checkpoint starts without the convolution and learns it
            count = mixer.taps if config.causal else 2 * mixer.taps - 1
            self.taps = nn.Parameter(torch.zeros(self.heads, count))

    def to_features(self, both: torch.Tensor, v: torch.Tensor, rope: Rope) -> Features:
        """What entries keep, and queries to match, from what `split_heads` gives.

        q features [..., H, K'], k features with gates and kept values [..., Hkv, .].
        """
        gates = self.entry_gates(both[..., self.heads :, :])
        if rope is not None:
            both = rotate(both, *rope)
        q, k = self.features(both).split((self.heads, self.kv_heads), dim=-2)
        if gates is not None:
            k = torch.cat((k, gates), dim=-1)
        return q, k, self.entry_values(v)

    def planned_bias(self) -> torch.Tensor | None:
        """The bias by distance as kernels know it; None without."""
        return None if self.relative is None else self.relative.by_distance()

    def part_plans(self) -> tuple[PartPlan, ...]:
        """What the KV heads read, as kernels know it: one part, but for mixers that divide them."""
        return (PartPlan(tuple(range(self.kv_heads)), self.attention_plan()),)

    def finalize_weights(self) -> None:
        """Compute what depends on the weights, once these are final."""
        if self.mixer.taps and self.config.causal:
            self.padded_taps = pad_taps(self.taps, self.kv_heads).detach()

    def forward(
        self, x: torch.Tensor, rope: Rope, real: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The full form: x [B, T, D] at positions 0..T-1 -> [B, T, D]; rope is [T, 1, K] each.

        real: for encoders, as in `mix_all`. A causal mixer needs no such thing: what stands behind
        a token changes nothing for it.
        """
        features = self.to_features(*self.split_heads(x), rope)
        q, k, v = (t.transpose(1, 2) for t in features)
        o = self.mix_causal(q, k, v) if self.config.causal else full_both(self, q, k, v, real)
        return self.o(o.transpose(1, 2).flatten(2))

    def mix_causal(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The full form of a decoder between `to_features` and the output projection: [B, H, T, V]."""
        if self.shard is None:
            return full(self, q, k, v)
        return full_of_shard(self, q, k, v, self.shard)

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: EntryState,
        layer: int,
    ) -> torch.Tensor:
        """The step form: x [M, D], all new nodes of all dense_groups packed -> [M, D]."""
        features = self.to_features(*self.split_heads(x), rope)
        return self.o(self.step_heads(features, dense_groups, state, layer))

    def step_heads(
        self, packed: Features, dense_groups: list[DenseGroup], state: EntryState, layer: int
    ) -> torch.Tensor:
        """The step form between `to_features` and the output projection: [M, H * V]."""
        outputs = []
        for dense_group in dense_groups:
            q, k, v = (dense_group.unpack(t).transpose(1, 2) for t in packed)
            form = self._step_form(dense_group)
            o = form(self, q, k, v, dense_group, state, layer)
            outputs.append(dense_group.pack(o.transpose(1, 2)))
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return mixed.flatten(1)

    def _step_form(self, dense_group: DenseGroup) -> StepForm:
        if self.sums_canvas:
            return step_both
        return step_long if dense_group.long else step_nodes

    @property
    def sums_canvas(self) -> bool:
        """Whether its step form is the bidirectional one, over the entries of a whole canvas."""
        return not self.config.causal and not self.steps_both_ways

    def state_makers(self) -> Makers:
        if self.sums_canvas:
            return CanvasEntries(self)
        return super().state_makers()


MIXERS: Registry[Mixer] = Registry("mixer", "linspec.mixers", options=LinearOptions, base=Mixer)
"""The registry of mixers. Packages add to it by entry points of the group `linspec.mixers`."""


def check_settings(mixer: MixerConfig) -> None:
    """Raise ConfigError if a size is set that the mixer of this name does not have."""
    takes = {setting.name for setting in MIXERS.entry(mixer.name).settings}
    given = {name: getattr(mixer, name) for name in ("features", "keep", "seed", "sinks")}
    for name, value in {**given, **mixer.options}.items():
        if (value or name in mixer.options) and name not in takes:
            raise ConfigError(
                f"mixer {mixer.name!r} has no {name!r} to set, got {quoted(value)}; leave it out"
            )


def check_direction(kind: type[Mixer], config: StackConfig, mixer: MixerConfig) -> None:
    """Raise ConfigError if a mixer of this kind does not fit a decoder, or an encoder."""
    if config.causal and not kind.causal:
        raise ConfigError(
            f"mixer {mixer.name!r} sees later tokens and fits encoders only; choose another for a "
            "decoder (linspec list)"
        )
    if not config.causal and not kind.bidirectional():
        raise ConfigError(
            f"mixer {mixer.name!r} has no bidirectional form and fits decoders only; choose "
            "another for an encoder (linspec list)"
        )
