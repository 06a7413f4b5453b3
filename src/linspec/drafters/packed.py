"""The inference form of Medusa heads: packed layers, and one call into C for a whole draft.

A draft is judged by its target, so rounding costs acceptance at most and never changes an output. Heads
therefore draft from 8-bit weights (4, where the target has 4), also for a float32 target: a small model
spends much of its time reading weights, and this is a quarter of them.

    heads = PackedHeads.of(medusa_heads, Quantizer(8, {}))
    heads.guess([row.hidden], heads=3, top=10)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from linspec.drafters.heads import HasHead, HeadBlock, Heads, HeadsConfig, MedusaHeads
from linspec.kernels.cpu.heads import HeadsCall
from linspec.kernels.cpu.library import load
from linspec.kernels.step_plan import BLOCKS, LinearPlan
from linspec.mixers.projections import LinearFactory
from linspec.models.linear import Quantizer, integer_bits
from linspec.models.native_linear import NativeLinear
from linspec.models.skeleton import without_memory


class PackedBlock(nn.Module):
    """One residual block of every head, a layer (two where there is an inner width) for each."""

    def __init__(self, first: Sequence[nn.Module], back: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first, self.back = nn.ModuleList(first), nn.ModuleList(back)

    def forward(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """What each head has [..., D], a block further."""
        inner = [F.silu(layer(x)) for layer, x in zip(self.first, rows, strict=True)]
        if len(self.back):
            inner = [layer(x) for layer, x in zip(self.back, inner, strict=True)]
        return [x + more for x, more in zip(rows, inner, strict=True)]


class PackedHeads(Heads):
    """Heads of packed layers; inference on the CPU only. Made by `of`, or loaded."""

    def __init__(
        self,
        config: HeadsConfig,
        head: nn.Module,
        accuracies: Sequence[Sequence[float]],
        blocks: Sequence[PackedBlock],
        outputs: Sequence[nn.Module],
    ) -> None:
        super().__init__(config, head, accuracies)
        self.blocks, self.outputs = nn.ModuleList(blocks), nn.ModuleList(outputs)
        # in a tuple, so that a copy for drafts is not registered as this module's
        self._used: tuple[NativeLinear, ...] = ()
        self._call: HeadsCall | None = None

    @classmethod
    def of(cls, heads: MedusaHeads, linear_factory: LinearFactory) -> PackedHeads:
        """`heads` with the layers that `linear_factory` makes."""
        blocks = [_packed_block(cast(HeadBlock, block), linear_factory) for block in heads.blocks]
        own: Sequence[torch.Tensor] = () if heads.config.shared_head else heads.out.unbind()
        outputs = [linear_factory(_linear(weight)) for weight in own]
        return cls(heads.config, heads.target_head, heads.accuracies, blocks, outputs)

    def bind(self, head: nn.Module) -> None:
        super().bind(head)
        self._used, self._call = (), None

    def follow(self, model: HasHead) -> None:
        super().follow(model)
        self._used, self._call = (), None

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = [hidden] * self.config.heads
        for block in self._blocks:
            rows = block(rows)
        return torch.stack(rows, -2)

    def logits(self, features: torch.Tensor, head: int) -> torch.Tensor:
        return self._outputs[head if len(self.outputs) else 0](features)

    @property
    def _outputs(self) -> tuple[NativeLinear, ...]:
        """Output layers: of each head, or the target's for all."""
        if not self._used:
            self._used = tuple(_native(self.outputs)) or (draft_head(self.target_head),)
        return self._used

    @property
    def _blocks(self) -> list[PackedBlock]:
        return cast("list[PackedBlock]", list(self.blocks))

    def guess(self, hidden: Sequence[torch.Tensor], heads: int, top: int) -> list[list[int]]:
        if load().library is None:
            return super().guess(hidden, heads, top)
        if self._call is None:
            blocks = [(_plans(block.first), _plans(block.back)) for block in self._blocks]
            self._call = HeadsCall(blocks, _plans(self._outputs))
        return self._call.guess(hidden, heads, top)


def _native(layers: nn.ModuleList) -> list[NativeLinear]:
    return cast("list[NativeLinear]", list(layers))


def _plans(layers: Iterable[nn.Module]) -> list[LinearPlan]:
    return [cast(NativeLinear, layer).plan() for layer in layers]


def draft_head(head: nn.Module) -> NativeLinear:
    """The target's output layer for drafts: itself if it has integer codes, else a copy in 8 bits."""
    if integer_bits(head) or (isinstance(head, NativeLinear) and head.kind == BLOCKS):
        return cast(NativeLinear, head)
    return cast(NativeLinear, Quantizer(8, {})(_linear(cast(torch.Tensor, head.weight))))


def _packed_block(block: HeadBlock, linear_factory: LinearFactory) -> PackedBlock:
    first = [
        linear_factory(_linear(w.T, bias)) for w, bias in zip(block.weight, block.bias, strict=True)
    ]
    return PackedBlock(
        first, [] if block.out is None else [linear_factory(_linear(w.T)) for w in block.out]
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A plain layer around weights [outputs, inputs]."""
    with without_memory():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return layer
