"""A decoder that also attends to an encoded source: one more softmax attention in every block.

The source is read once and never changes, so all nodes of all token trees share its keys and
values. They lie in a `SourceCache` beside the state of the self-attention: slots, snapshots and forks work
as for any other state, and committing does not touch them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from linspec.mixers.base import Rope
from linspec.mixers.norms import make_norm
from linspec.mixers.projections import LinearFactory
from linspec.models.block import Block
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.layer_path import LayerPath
from linspec.models.norm import inference_norm
from linspec.state.contract import LayerState, Makers, StateOptions
from linspec.state.dense_group import DenseGroup
from linspec.state.sequence_states import MixedState, SequenceStates
from linspec.state.source import SourceCache, SourceSpec


@dataclass(frozen=True, slots=True)
class Source:
    """Encoded sources as one block sees them: keys, values [B, H, S, K]; real [B, S], None for all."""

    keys: torch.Tensor
    values: torch.Tensor
    real: torch.Tensor | None


class CrossAttention(nn.Module):
    """Softmax attention from a decoder's tokens to an encoder's."""

    keeps_cache = False
    offloads = False

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.head_width
        self.scale = config.score_scale
        inner = config.heads * config.head_width
        self.q: nn.Module = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.o: nn.Module = nn.Linear(inner, config.width, bias=config.out_bias)

    def state_spec(self) -> SourceSpec:
        """Sizes of the keys and values of a source."""
        widths = {"key_width": self.head_width, "value_width": self.head_width}
        return SourceSpec(kv_heads=self.heads, **widths)

    def new_state(self, layers: Sequence[Any], slots: int, options: StateOptions) -> LayerState:
        """Empty sources of all slots."""
        return SourceCache(self.state_spec(), len(layers), slots, options)

    def read(self, hidden: torch.Tensor, real: torch.Tensor | None) -> Source:
        """Keys and values of encoded sources [B, S, D]."""
        return Source(self._heads(self.k(hidden)), self._heads(self.v(hidden)), real)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def forward(self, x: torch.Tensor, source: Source) -> torch.Tensor:
        """x [B, T, D], any tokens: [B, T, D]."""
        return self.o(self._attend(self._heads(self.q(x)), source).transpose(1, 2).flatten(2))

    def step(
        self, x: torch.Tensor, dense_groups: list[DenseGroup], state: SourceCache, layer: int
    ) -> torch.Tensor:
        """Packed nodes [M, D] -> [M, D]."""
        q = self.q(x).unflatten(-1, (self.heads, self.head_width))
        outputs = []
        for dense_group in dense_groups:
            source = _source_of(dense_group, state, layer)
            o = self._attend(dense_group.unpack(q).transpose(1, 2), source)
            outputs.append(dense_group.pack(o.transpose(1, 2)))
        return self.o(torch.cat(outputs).flatten(1))

    def _attend(self, q: torch.Tensor, source: Source) -> torch.Tensor:
        mask = None if source.real is None else source.real[:, None, None]
        return F.scaled_dot_product_attention(
            q, source.keys, source.values, attn_mask=mask, scale=self.scale
        )

    def to_inference(self, linear_factory: LinearFactory) -> None:
        """Replace what every step uses by its inference form."""
        self.q, self.o = linear_factory(self.q), linear_factory(self.o)


def _source_of(dense_group: DenseGroup, state: SourceCache, layer: int) -> Source:
    lengths = [state.lengths[slot] for slot in dense_group.slot_range]
    longest = max(lengths)
    keys, values = state.read(layer, dense_group.slots, longest)
    if min(lengths) == longest:
        return Source(keys, values, None)
    places = torch.arange(longest, device=keys.device)
    return Source(keys, values, places < torch.tensor(lengths, device=keys.device)[:, None])


class CrossBlock(Block):
    """A decoder's block with cross-attention between the mixer and the MLP."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.cross_norm = make_norm(config)
        self.cross = CrossAttention(config)

    def attend(self, x: torch.Tensor, rope: Rope, source: Source) -> torch.Tensor:
        """The full form."""
        x = x + self.mixer(self.mixer_norm(x), rope)
        x = x + self.cross(self.cross_norm(x), source)
        return x + self.mlp(self.mlp_norm(x))

    def state_makers(self) -> Makers:
        return self.mixer.state_makers(), self.cross

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: Any,
        layer: int,
    ) -> torch.Tensor:
        assert isinstance(state, MixedState), "a mixer and a source"
        own, source = state.parts
        x = x + self.mixer.step(self.mixer_norm(x), rope, dense_groups, *own)
        x = x + self.cross.step(self.cross_norm(x), dense_groups, *source)
        return x + self.mlp(self.mlp_norm(x))

    def to_inference(self, linear_factory: LinearFactory) -> None:
        super().to_inference(linear_factory)
        self.cross.to_inference(linear_factory)

    def finalize_weights(self) -> None:
        super().finalize_weights()
        self.cross_norm = inference_norm(self.cross_norm)


class CrossDecoder(Decoder):
    """A decoder whose blocks also see an encoded source."""

    def make_block(self, layer: int) -> Block:
        return CrossBlock(self.config, layer)

    @property
    def cross_blocks(self) -> list[CrossBlock]:
        """The blocks, first to last."""
        return cast("list[CrossBlock]", list(self.blocks))

    def sources(self, hidden: torch.Tensor, real: torch.Tensor | None) -> list[Source]:
        """Encoded sources [B, S, D] as each block sees them; real [B, S] is true at their tokens."""
        return [block.cross.read(hidden, real) for block in self.cross_blocks]

    def decode(self, ids: torch.Tensor, sources: Sequence[Source]) -> torch.Tensor:
        """Final normalized hidden states [B, T, D] of ids [B, T] (padded at the end if at all)."""
        x, ropes = self.enter(ids, torch.arange(ids.shape[1], device=ids.device))
        for block, rope, source in zip(self.cross_blocks, ropes, sources, strict=True):
            x = block.attend(x, rope, source)
        return self.leave(x)

    def run(
        self,
        x: torch.Tensor,
        ropes: Sequence[Rope],
        dense_groups: list[DenseGroup],
        state: SequenceStates,
        path: LayerPath,
    ) -> torch.Tensor:
        slots = [slot for dense_group in dense_groups for slot in dense_group.slot_range]
        sources_of(state).check_filled(slots)
        return super().run(x, ropes, dense_groups, state, path)


def sources_of(state: SequenceStates) -> SourceCache:
    """Where a decoder with sources keeps them."""
    return next(part for part in state.parts if isinstance(part, SourceCache))
