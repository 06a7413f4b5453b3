"""What a mixer says about itself: the words that the forms, the states and the kernels ask it for.

A mixer must say what its state is and how it mixes values in its two forms: `state_spec`, `new_state`,
`attend`, `mix`. The rest has a default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from linspec.decoding.tree_mask import TreeMask
from linspec.kernels.step_plan import AttentionPlan, SummedPlan
from linspec.mixers.carry import Carry
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.state.contract import LayerState, Makers, StateOptions
from linspec.state.entries import EntrySpec


class MixerContract:
    """The words of a mixer. `forms.py` computes with these and with nothing else of it.

    Tensor letters are those of docs/architecture.md; K' and V' are the widths of what entries keep.

    Attributes:
        causal: False for a mixer that sees later tokens; it fits encoders only.
        biased: whether the weights take a relative position bias, where the backbone has one.
        keeps_cache: whether its state is a cache whose entries can be kept in another format.
        offloads: whether its state has something to put into a file.
        ends_alone: whether there is a `mix_end`.
        stands_in: whether it has no weights of its own, and may take the place of softmax in a trained model.
        steps_both_ways: whether `attend` is right for tokens that overwrite and see all positions.
        static_step: whether `attend` decides nothing by what is in its tensors where the tree mask is static;
            see `has_static_step`.
    """

    causal: ClassVar[bool] = True
    biased: ClassVar[bool] = False
    stands_in: ClassVar[bool] = False
    static_step: ClassVar[bool] = False
    keeps_cache: bool = False
    offloads: bool = False
    ends_alone: bool = False
    steps_both_ways: bool = False

    # ---- must be said

    def state_spec(self) -> EntrySpec:
        """Sizes of the state; layers with equal specs share one state object."""
        raise NotImplementedError

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        """An empty state for `layers`, mixers whose specs equal this one's."""
        raise NotImplementedError

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

    def combine(self, exact: torch.Tensor | None, summed: torch.Tensor | None) -> torch.Tensor:
        """Outputs [..., V] from what nodes read one by one and through sums, [..., V'] each, None without.

        Where kernels read what `attention_plan` says, in place of `attend`.
        """
        assert exact is not None, "who has sums says what is made of them"
        return exact

    # ---- what an entry keeps

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What queries and keys become before they are multiplied: [..., H + Hkv, K] -> [..., K'].

        Queries of all heads come first, so that a map of their own can tell them from keys.
        """
        return x

    def entry_values(self, v: torch.Tensor) -> torch.Tensor:
        """What values become before they are kept: [..., V] -> [..., V']."""
        return v

    def entry_gates(self, k: torch.Tensor) -> torch.Tensor | None:
        """Columns kept beside each key, from keys before rotation: [..., Hkv, K] -> [..., Hkv, E]."""
        return None

    # ---- further forms and readers

    def mix_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """As `mix` without causality, for encoders: every token sees every real token.

        real [B, T] is true at real tokens, which come first in each sequence; k and v are zero elsewhere.
        None means that all are real. Softmax takes [B, T, T] too: which keys each query sees.
        """
        raise NotImplementedError

    def mix_end(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The end of `mix`: outputs [1, H, N, V] of the last N tokens, whose queries are q.

        k and v are those of all tokens. With `ends_alone` a long chain computes nothing again that was
        committed before it.
        """
        raise NotImplementedError

    def carry(self) -> Carry | None:
        """What a shard of a sequence takes over from those before it, where processes share the sequence.

        None: that is not known, and each process needs all of it.
        """
        return None

    def part_carries(self) -> tuple[Carry | None, ...]:
        """`carry` of the parts that its heads are divided among; None too where it is not the mixer's own."""
        return (self.carry() if self._own("carry", "mix", "fold", "forward") else None,)

    def has_static_step(self) -> bool:
        """Whether it can be part of a step that is recorded once and replayed with other tensors."""
        return self.static_step and self._own("static_step", "attend")

    @classmethod
    def bidirectional(cls) -> bool:
        """Whether there is a form for encoders: one that is as much the mixer's own as its causal form."""
        return cls._own("mix_all", "mix") and cls.mix_all is not MixerContract.mix_all

    @classmethod
    def _own(cls, name: str, *beside: str) -> bool:
        """Whether no class further down changes one of the methods `beside` and leaves `name` as it was."""
        owner = {
            each: place
            for place, kind in reversed(list(enumerate(cls.__mro__)))
            for each in (name, *beside)
            if each in kind.__dict__
        }
        return all(owner[name] <= owner.get(each, owner[name]) for each in beside)

    @classmethod
    def for_layers(cls, mixer: MixerConfig, config: StackConfig, count: int) -> list[MixerConfig]:
        """The settings of `count` layers of a stack that all get `mixer`, first to last."""
        return [mixer] * count

    def state_makers(self) -> Makers:
        """Who makes the state: the mixer, or the parts that its heads are divided among."""
        return self

    def attention_plan(self) -> AttentionPlan | SummedPlan | None:
        """The step form as kernels know it; None when it is another."""
        return None
