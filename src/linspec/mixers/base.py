"""What every mixer shares: projections, the two forms, the causal convolution over values.

A mixer is one function in two forms. The *full form* (`forward`) sees a whole sequence, is parallel
over time and differentiable. The *step form* (`step`) sees the new nodes of a step against the
committed state of their slots. In an encoder there is only a full form, without causality. All
compute

    o_t = mix of values  +  sum_{j < W} c_j v_{t-j}

where the last term is the causal depthwise convolution (one set of W taps per query head, shared by its
channels). What a mixer is made of are functions on tensors, in `ops/`; see CONTRIBUTING.md for a worked
example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from linspec.decoding.tree_mask import TreeMask
from linspec.errors import ConfigError
from linspec.kernels.step_plan import AttentionPlan
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.ops.convolution import convolve, convolve_both, convolve_nodes, pad_taps
from linspec.mixers.options import LinearOptions
from linspec.mixers.projections import HeadProjections
from linspec.mixers.relative import RelativeBias
from linspec.mixers.rope import rotate
from linspec.state.contract import EntryState, LayerState, Makers, StateOptions
from linspec.state.entries import EntrySpec
from linspec.utils.registry import Registry

if TYPE_CHECKING:
    from linspec.state.dense_group import DenseGroup

Rope = tuple[torch.Tensor, torch.Tensor] | None


class Mixer(HeadProjections):
    """The part of a block through which a token sees other tokens, in two forms of one function.

    The full form (`forward`) computes a whole sequence, the step form (`step`) new tree nodes against the
    state of their slots. Both give the same outputs. A new mixer defines a few of the methods; see
    `CONTRIBUTING.md`.

    Attributes:
        causal: False for a mixer that sees later tokens; it fits encoders only.
        biased: whether the weights take a relative position bias, where the backbone has one.

    Raises:
        ConfigError: a size is set that this mixer does not have, or it does not fit the backbone.
    """

    causal: ClassVar[bool] = True
    biased: ClassVar[bool] = False
    keeps_cache: bool = False

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config)
        takes = {setting.name for setting in MIXERS.entry(mixer.name).settings}
        for name in ("features", "keep", "seed", "sinks"):
            if getattr(mixer, name) and name not in takes:
                raise ConfigError(
                    f"mixer {mixer.name!r} has no {name!r} to set, got {getattr(mixer, name)}; leave it out"
                )
        self._check_direction(config, mixer)
        self.config, self.mixer = config, mixer
        self.padded_taps: torch.Tensor | None = None
        self.relative: RelativeBias | None = None
        if self.biased and config.relative is not None:
            self.relative = RelativeBias(config.relative, self.heads, causal=config.causal)
        if mixer.taps:
            # zero taps: a converted checkpoint starts without the convolution and learns it
            count = mixer.taps if config.causal else 2 * mixer.taps - 1
            self.taps = nn.Parameter(torch.zeros(self.heads, count))

    def _check_direction(self, config: StackConfig, mixer: MixerConfig) -> None:
        if config.causal and not self.causal:
            raise ConfigError(
                f"mixer {mixer.name!r} sees later tokens and fits encoders only; choose another for a "
                "decoder (linspec list)"
            )
        if not config.causal and not self.bidirectional():
            raise ConfigError(
                f"mixer {mixer.name!r} has no bidirectional form and fits decoders only; choose "
                "another for an encoder (linspec list)"
            )

    @classmethod
    def bidirectional(cls) -> bool:
        """Whether there is a form for encoders: one that is as much the mixer's own as its causal form."""
        owners = [
            next(place for place, kind in enumerate(cls.__mro__) if name in kind.__dict__)
            for name in ("mix_all", "mix")
        ]
        return owners[0] <= owners[1] and cls.mix_all is not Mixer.mix_all

    # ---- what a mixer defines

    def state_spec(self) -> EntrySpec:
        """Sizes of the state; layers with equal specs share one state object."""
        raise NotImplementedError

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        """An empty state for `layers`, mixers whose specs equal this one's."""
        raise NotImplementedError

    def state_makers(self) -> Makers:
        """Who makes the state: the mixer, or the parts that its heads are divided among."""
        return self

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What queries and keys become before they are multiplied: [..., H + Hkv, K] -> [..., K'].

        Queries of all heads come first, so that a map of their own can tell them from keys.
        """
        return x

    def entry_values(self, v: torch.Tensor) -> torch.Tensor:
        """What values become before they are kept: [..., V] -> [..., V']."""
        return v

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tree_mask: TreeMask,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        """Step form on features: what nodes with queries q read from the entries and sums of their slots.

        q [R, Hkv, rep, N, K'], keys [R, Hkv, C, K'], values [R, Hkv, C, V'] and sums as its state
        keeps them -> [R, Hkv, rep, N, V].
        """
        raise NotImplementedError

    def entry_gates(self, k: torch.Tensor) -> torch.Tensor | None:
        """Columns kept beside each key, from keys before rotation: [..., Hkv, K] -> [..., Hkv, E]."""
        return None

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Full form on features q [B, H, T, K'], k [B, Hkv, T, K'] and kept values v [B, Hkv, T, V'].

        sums [B, Hkv, S, Z] are the groups closed before the sequence. Returns [B, H, T, V].
        """
        raise NotImplementedError

    def mix_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """As `mix` without causality, for encoders: every token sees every real token.

        real [B, T] is true at real tokens, which come first in each sequence; k and v are zero elsewhere.
        None means that all are real.
        """
        raise NotImplementedError

    def attention_plan(self) -> AttentionPlan | None:
        """The step form as kernels know it; None when it is another."""
        return None

    # ---- the forms

    def project(
        self, x: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., D] -> q features [..., H, K'], k features with gates and kept values [..., Hkv, .]."""
        return self.to_features(*self.split_heads(x), rope)

    def to_features(
        self, both: torch.Tensor, v: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `project` gives, from what `split_heads` gives."""
        gates = self.entry_gates(both[..., self.heads :, :])
        if rope is not None:
            both = rotate(both, *rope)
        q, k = self.features(both).split((self.heads, self.kv_heads), dim=-2)
        if gates is not None:
            k = torch.cat((k, gates), dim=-1)
        return q, k, self.entry_values(v)

    def finalize_weights(self) -> None:
        """Compute what depends on the weights, once these are final."""
        if self.mixer.taps and self.config.causal:
            self.padded_taps = self._padded_taps().detach()

    def forward(
        self, x: torch.Tensor, rope: Rope, real: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The full form: x [B, T, D] at positions 0..T-1 -> [B, T, D]; rope is [T, 1, K] each.

        real: for encoders, as in `mix_all`. A causal mixer needs no such thing: what stands behind
        a token changes nothing for it.
        """
        q, k, v = (t.transpose(1, 2) for t in self.project(x, rope))
        o = self._full(q, k, v) if self.config.causal else self._full_both(q, k, v, real)
        return self.o(o.transpose(1, 2).flatten(2))

    def _full(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        conv_history: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`mix` plus the convolution; conv_history [B, Hkv, W-1, V'] are the values before v."""
        o = self.mix(q, k, v, sums)
        if self.mixer.taps:
            o = o + convolve(v, self.taps, self.repeats, conv_history)[..., : self.head_width]
        return o

    def _full_both(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """`mix_all` plus the centred convolution."""
        if real is not None:
            k, v = (t.masked_fill(~real[:, None, :, None], 0.0) for t in (k, v))
        o = self.mix_all(q, k, v, real)
        if self.mixer.taps:
            o = o + convolve_both(v, self.taps, self.repeats)[..., : self.head_width]
        return o

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: EntryState,
        layer: int,
    ) -> torch.Tensor:
        """The step form: x [M, D], all new nodes of all dense_groups packed -> [M, D]."""
        return self.o(self.step_heads(self.project(x, rope), dense_groups, state, layer))

    def step_heads(
        self,
        packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dense_groups: list[DenseGroup],
        state: EntryState,
        layer: int,
    ) -> torch.Tensor:
        """The step form between `project` and the output projection: [M, H * V]."""
        outputs = []
        for dense_group in dense_groups:
            q, k, v = (dense_group.unpack(t).transpose(1, 2) for t in packed)
            form = self._step_long if dense_group.long else self._step_nodes
            outputs.append(
                dense_group.pack(form(q, k, v, dense_group, state, layer).transpose(1, 2))
            )
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return mixed.flatten(1)

    def _step_nodes(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dense_group: DenseGroup,
        state: EntryState,
        layer: int,
    ) -> torch.Tensor:
        """A few nodes a slot, any tree: one masked product over the entries of each slot."""
        if dense_group.overwrite is None:
            state.stage(layer, dense_group.start, dense_group.lengths, k, v)
        else:
            state.overwrite(layer, dense_group.start, dense_group.overwrite, k[0], v[0])
        tree_mask = dense_group.tree_mask(state)
        slots, width = dense_group.slots, tree_mask.width
        keys, values = state.read(layer, slots, width)
        sums = state.read_sums(layer, slots)
        q = state.entries.queries(q)
        q = q.unflatten(1, (self.kv_heads, self.repeats))
        o = self.attend(q, keys, values[:, :, state.spec.conv_history :], tree_mask, sums)
        if self.mixer.taps:
            o = o + self._convolved(values, tree_mask, state.spec.conv_history)
        return o.flatten(1, 2)

    def _convolved(
        self, values: torch.Tensor, tree_mask: TreeMask, conv_history: int
    ) -> torch.Tensor:
        """The convolution for the nodes of a step: values [R, Hkv, W-1 + C, V'] -> [R, Hkv, rep, N, V]."""
        final = self.padded_taps is not None
        padded = self.padded_taps if self.padded_taps is not None else self._padded_taps()
        values = values[..., : self.head_width]
        return convolve_nodes(values, tree_mask, padded, conv_history, final=final)

    def _padded_taps(self) -> torch.Tensor:
        return pad_taps(self.taps, self.kv_heads)

    def _step_long(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dense_group: DenseGroup,
        state: EntryState,
        layer: int,
    ) -> torch.Tensor:
        """Long chains (prefill): the full form from each base_position on, with the state before it."""
        keys, values = state.stage_long(layer, dense_group.start, dense_group.lengths, k, v)
        q = state.entries.queries(q)
        bases = [state.held(slot) for slot in dense_group.slot_range]
        aligned = q.new_zeros(*q.shape[:2], keys.shape[2], q.shape[3])
        for i, (base, n) in enumerate(zip(bases, dense_group.lengths, strict=True)):
            aligned[i, :, base : base + n] = q[i, :, :n]
        conv_history = state.spec.conv_history
        sums = state.read_sums(layer, dense_group.slots)
        o = self._full(
            aligned, keys, values[:, :, conv_history:], values[:, :, :conv_history], sums
        )
        out = o.new_zeros(*q.shape[:3], o.shape[3])
        for i, (base, n) in enumerate(zip(bases, dense_group.lengths, strict=True)):
            out[i, :, :n] = o[i, :, base : base + n]
        return out


MIXERS: Registry[Mixer] = Registry("mixer", "linspec.mixers", options=LinearOptions)
"""The registry of mixers. Packages add to it by entry points of the group `linspec.mixers`."""
