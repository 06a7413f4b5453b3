"""The inference form of Medusa heads: packed layers, and one call into C for a whole draft.

A draft is judged by its target, so rounding costs acceptance at most and never changes an output. Heads
therefore draft from 8-bit weights (4, where the target has 4), also for a float32 target: a small model
spends much of its time reading weights, and this is a quarter of them.

    heads = PackedHeads.of(medusa_heads, Quantizer(8, {}))
    heads.guess([row.hidden], [row.root], heads=3, top=10)
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
        """What each head has [..., D], a block further; it may read more than the D that it adds to."""
        inner = [F.silu(layer(x)) for layer, x in zip(self.first, rows, strict=True)]
        if len(self.back):
            inner = [layer(x) for layer, x in zip(self.back, inner, strict=True)]
        return [x[..., : more.shape[-1]] + more for x, more in zip(rows, inner, strict=True)]


class PackedHeads(Heads):
    """Heads of packed layers; inference on the CPU only, elsewhere see `plain`. Made by `of`, or loaded."""

    def __init__(
        self,
        config: HeadsConfig,
        target: HasHead,
        accuracies: Sequence[Sequence[float]],
        blocks: Sequence[PackedBlock],
        outputs: Sequence[nn.Module],
        drafted: torch.Tensor | None = None,
    ) -> None:
        super().__init__(config, target, accuracies, drafted)
        self.blocks, self.outputs = nn.ModuleList(blocks), nn.ModuleList(outputs)
        # what is used now and what it was made of; in tuples, as neither is a part of this module
        self._used: tuple[NativeLinear, ...] = ()
        self._made_of: tuple[nn.Module, ...] = ()
        self._call: HeadsCall | None = None
        self._ids: list[int] | None = None

    @classmethod
    def of(cls, heads: MedusaHeads, linear_factory: LinearFactory) -> PackedHeads:
        """`heads` with the layers that `linear_factory` makes."""
        blocks = [_packed_block(cast(HeadBlock, block), linear_factory) for block in heads.blocks]
        own: Sequence[torch.Tensor] = () if heads.config.shared_head else heads.out.unbind()
        outputs = [linear_factory(_linear(weight)) for weight in own]
        return cls(heads.config, heads.target, heads.accuracies, blocks, outputs, heads.drafted)

    def plain(self) -> MedusaHeads:
        """Heads of the float32 weights that the packed ones stand for."""
        heads = MedusaHeads(self.config, self.target, self.accuracies, self.drafted)
        for made, block in zip(heads.blocks, self._blocks, strict=True):
            first = _native(block.first)
            made.weight = _fixed([layer.weight.T for layer in first])
            made.bias = _fixed([cast(torch.Tensor, layer.bias) for layer in first])
            if len(block.back):
                made.out = _fixed([layer.weight.T for layer in _native(block.back)])
        if len(self.outputs):
            heads.out = _fixed([layer.weight for layer in _native(self.outputs)])
        return heads.requires_grad_(False).eval()

    def features(self, seen: torch.Tensor) -> torch.Tensor:
        rows = [seen] * self.config.heads
        for block in self._blocks:
            rows = block(rows)
        return torch.stack(rows, -2)

    def logits(self, features: torch.Tensor, head: int) -> torch.Tensor:
        return self._outputs[head if len(self.outputs) else 0](features)

    @property
    def _outputs(self) -> tuple[NativeLinear, ...]:
        """Output layers: of each head, or the target's for all, which may have been prepared since."""
        if len(self.outputs):
            return tuple(_native(self.outputs))
        head = self.target_head
        if not self._made_of or self._made_of[0] is not head:
            self._made_of, self._call = (head,), None
            self._used = (draft_head(head, self.drafted),)
        return self._used

    @property
    def _blocks(self) -> list[PackedBlock]:
        return cast("list[PackedBlock]", list(self.blocks))

    def guess(
        self, hidden: Sequence[torch.Tensor], roots: Sequence[int], heads: int, top: int
    ) -> list[list[int]]:
        if load().library is None:
            return super().guess(hidden, roots, heads, top)
        outputs = self._outputs
        if self._call is None:
            blocks = [(_plans(block.first), _plans(block.back)) for block in self._blocks]
            self._call = HeadsCall(blocks, _plans(outputs), self.config.width)
            self._ids = None if self.drafted is None else self.drafted.tolist()
        if self.config.rooted:
            hidden = list(self.seen(torch.stack(list(hidden)), torch.tensor(roots)))
        found = self._call.guess(hidden, heads, top)
        ids = self._ids
        return found if ids is None else [[ids[at] for at in row] for row in found]


def _fixed(weights: Sequence[torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack(list(weights)), requires_grad=False)


def _native(layers: nn.ModuleList) -> list[NativeLinear]:
    return cast("list[NativeLinear]", list(layers))


def _plans(layers: Iterable[nn.Module]) -> list[LinearPlan]:
    return [cast(NativeLinear, layer).plan() for layer in layers]


def draft_head(head: nn.Module, drafted: torch.Tensor | None = None) -> NativeLinear:
    """The target's output layer for drafts: itself if it has integer weights, else a copy in 8 bits.

    drafted: the tokens to draft, whose rows are always copied; None is all.
    """
    if drafted is None and (integer_bits(head) or _of_blocks(head)):
        return cast(NativeLinear, head)
    weight = cast(torch.Tensor, head.weight).detach()
    rows = weight if drafted is None else weight[drafted.long()]
    return cast(NativeLinear, Quantizer(8, {})(_linear(rows)))


def _of_blocks(head: nn.Module) -> bool:
    """Whether its weights are blocks of a file, with integer codes."""
    return isinstance(head, NativeLinear) and head.kind == BLOCKS


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
