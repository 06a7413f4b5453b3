"""The inference form of a block drafter: packed layers, and one call into C for a whole draft.

As the heads of `linspec.drafters.packed`, it drafts from 8-bit weights for a float target too: rounding costs
acceptance at most and never changes an output.

    net = PackedBlockNet.of(block_net, Quantizer(8, {}))
    tokens, confidences = net.draft(cache, asked)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from linspec.drafters.block_cache import Asked, BlockCache, draft
from linspec.drafters.block_net import BlockLayer, BlockNet
from linspec.drafters.packed import draft_head
from linspec.kernels.cpu.block_draft import BlockCall, BlockInput, BlockPlan
from linspec.kernels.cpu.fusion import FusionPlan
from linspec.kernels.cpu.library import load
from linspec.kernels.step_plan import (
    AttentionPlan,
    LayerPlan,
    LinearPlan,
    NormPlan,
    PartBuffers,
    PartPlan,
    RotaryPlan,
    StepPlan,
)
from linspec.mixers.projections import LinearFactory
from linspec.models.native_linear import NativeLinear
from linspec.models.skeleton import without_memory


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """What a packed drafter makes of its target.

    made_of: the target's output layer. output: that of the drafter, of the tokens `ids`. call: None without
    the compiled library.
    """

    made_of: nn.Module
    output: NativeLinear
    ids: list[int]
    call: BlockCall | None


class PackedBlockNet(BlockNet):
    """A block drafter of packed layers; inference on the CPU only. Made by `of`, or loaded."""

    _bound: Bound | None = None

    @classmethod
    def of(cls, net: BlockNet, linear_factory: LinearFactory) -> PackedBlockNet:
        """`net` with the layers that `linear_factory` makes; what is small stays float32."""
        with without_memory():
            made = cls(net.config, net.target, net.measured, net.drafted)
        weights = net.state_dict()
        made.load_state_dict(
            {n: w.float() if w.is_floating_point() else w for n, w in weights.items()}, assign=True
        )
        for owner, name in made._large():
            setattr(owner, name, linear_factory(getattr(owner, name)))
        return made.requires_grad_(False).eval()

    def _large(self) -> list[tuple[nn.Module, str]]:
        """The layers that are packed: whose they are, and their names there."""
        names = ("qkv", "out", "up", "down")
        inner = [(layer, name) for layer in self.layers for name in names]
        return [(self, "fuse"), (self, "markov_out"), *inner]

    def bound(self) -> Bound:
        """What is made of the target, which may be prepared after this drafter."""
        head = self.target.head
        if self._bound is None or self._bound.made_of is not head:
            output = draft_head(head, self.drafted)
            every = torch.arange(self.config.drafted)
            before = self.markov_in(self.embedded(self.tokens(every))).contiguous()
            call = None if load().library is None else self._call(output, before)
            self._bound = Bound(head, output, self.tokens(every).tolist(), call)
        return self._bound

    def unary(self, states: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.bound().output(states))

    def _call(self, head: NativeLinear, before: torch.Tensor) -> BlockCall:
        sure = torch.cat((self.sure.weight[0], self.sure.bias))
        norms = tuple(norm.weight.detach() for norm in self._read_norms)
        parts = BlockPlan(
            FusionPlan(norms, _plan(self.fuse), self.context_norm.weight.detach()),
            self.masks.detach(),
            _plan(self.markov_out),
            before,
            sure.detach(),
        )
        return BlockCall(self._step_plan(head), parts)

    def _step_plan(self, head: NativeLinear) -> StepPlan:
        """Its layers as those of a decoder, whose nodes are places of a block."""
        shape = self.config
        return StepPlan(
            layers=tuple(self._layer_plan(layer) for layer in self._layers),
            width=shape.width,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_width=shape.head_width,
            mlp_width=shape.mlp_width,
            vocabulary=shape.drafted,
            norm_eps=shape.eps,
            activation="silu",
            gated_mlp=True,
            # nodes are given, and none has a token
            embedding=self.masks.detach(),
            embedding_scale=1.0,
            position_rows=None,
            rotaries=(RotaryPlan(self.frequencies(), 1.0),),
            residual_scale=1.0,
            score_scale=shape.head_width**-0.5,
            score_cap=0.0,
            final_norm=NormPlan(self.norm.weight.detach()),
            logit_scale=1.0,
            logit_cap=0.0,
            head=head.plan(),
        )

    def _layer_plan(self, layer: BlockLayer) -> LayerPlan:
        shape = self.config
        # rows of context and the block itself
        attention = AttentionPlan(window=shape.window + shape.places)
        return LayerPlan(
            mixer="softmax",
            parts=(PartPlan(tuple(range(shape.kv_heads)), attention),),
            mixer_out_norm=None,
            mlp_out_norm=None,
            rotary=0,
            parallel=False,
            conv_weights=None,
            mixer_norm=NormPlan(layer.mixer_norm.weight.detach()),
            mlp_norm=NormPlan(layer.mlp_norm.weight.detach()),
            q_norm=NormPlan(layer.q_norm.weight.detach()),
            k_norm=NormPlan(layer.k_norm.weight.detach()),
            qkv=_plan(layer.qkv),
            out=_plan(layer.out),
            up=_plan(layer.up),
            down=_plan(layer.down),
        )

    @torch.inference_mode()
    def draft(
        self, cache: BlockCache, asked: Sequence[Asked]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and confidences [S][B], as `draft` computes them layer by layer."""
        call, ids = self.bound().call, self.bound().ids
        if call is None or not asked:
            return draft(self, cache, asked)
        roots = self.embedded(torch.tensor([each.root for each in asked]))
        before, inputs = self.markov_in(roots), []
        for each, root, first in zip(asked, roots, before, strict=True):
            fresh = cache.fresh(each)
            count = cache.counts[each.slot]
            inputs.append(BlockInput(each.slot, count, each.position, fresh, root, first))
        call.place(
            [
                [PartBuffers(0, *pair, None, 0)]
                for pair in zip(cache.keys, cache.values, strict=True)
            ]
        )
        drafts, sure = call.draft(inputs, cache.newest)
        for given in inputs:
            cache.enter(given.slot, given.more, given.position)
        return [[ids[at] for at in row] for row in drafts], [self._shares(row) for row in sure]

    def _shares(self, sure: Sequence[float]) -> list[float]:
        """As `confidences`, for the few numbers of one block."""
        given = self.measured.temperatures or [1.0] * len(sure)
        return [0.5 + 0.5 * math.tanh(x / (2 * t)) for x, t in zip(sure, given, strict=True)]


def _plan(layer: nn.Module) -> LinearPlan:
    return cast(NativeLinear, layer).plan()
