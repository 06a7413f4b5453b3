"""The stack of every encoder: embeddings and blocks in which each token sees all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from linspec.errors import ContextOverflow, InputError
from linspec.mixers.base import Rope
from linspec.mixers.norms import make_norm
from linspec.mixers.projections import LinearFactory
from linspec.mixers.rope import Rotary
from linspec.models.block import Block
from linspec.models.config import EncoderConfig
from linspec.models.linear import fused_linear
from linspec.models.norm import inference_norm
from linspec.models.padding import from_left, to_left


class EncoderBlock(Block):
    """Residual block of an encoder, with its norms before or after the sums."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.post_norm = config.post_norm

    def forward(
        self, x: torch.Tensor, rope: Rope, real: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.post_norm:
            x = self.mixer_norm(x + self.mixer(x, rope, real))
            return self.mlp_norm(x + self.mlp(x))
        x = x + self.mixer(self.mixer_norm(x), rope, real)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """Token ids in, hidden states out."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.width)
        elif config.positions == "rope":
            self.rotary = Rotary(config.rope, config.head_width)
        if config.token_types:
            self.embed_types = nn.Embedding(config.token_types, config.width)
        self.blocks = nn.ModuleList(EncoderBlock(config, i) for i in range(config.layers))
        # the one norm outside the blocks: behind the embeddings, or behind the last block
        self.norm = make_norm(config)

    @property
    def layers(self) -> list[EncoderBlock]:
        """The blocks, first to last."""
        return cast("list[EncoderBlock]", list(self.blocks))

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] of ids [B, T]; `mask` [B, T] is true at real tokens.

        Rows may be padded at either end: positions and groups count from the first real token, and
        states at padding mean nothing. types [B, T]: each token's dense_group, 0 if left out. Raises
        InputError for an empty row, ContextOverflow for a row beyond the learned positions.
        """
        types = torch.zeros_like(ids) if types is None else types
        if mask is None:
            self._check_length(ids.shape[1])
            return self._run(ids, types, None)
        if not bool(mask.any(1).all()):
            raise InputError("a row of the batch has no tokens; leave it out")
        lengths = mask.sum(1)
        longest = int(lengths.max())
        self._check_length(longest)
        width = ids.shape[1]
        ids, shifts = to_left(ids, mask)
        types, _ = to_left(types, mask)
        real = torch.arange(longest, device=ids.device) < lengths[:, None]
        hidden = self._run(ids[:, :longest], types[:, :longest], real)
        return from_left(nn.functional.pad(hidden, (0, 0, 0, width - longest)), shifts)

    def _check_length(self, longest: int) -> None:
        limit = self.config.max_positions if self.config.positions == "learned" else None
        if limit is not None and longest > limit:
            raise ContextOverflow(
                f"a row has {longest} tokens, this encoder has positions for {limit}; split the text"
            )

    def _run(
        self, ids: torch.Tensor, types: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states of rows whose real tokens come first."""
        for state in self._states(ids, types, real):
            x = state
        return x if self.config.post_norm else self.norm(x)

    def trace(self, ids: torch.Tensor, real: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states [B, T, D] behind every block, of rows whose real tokens come first."""
        return list(self._states(ids, torch.zeros_like(ids), real))

    def _states(
        self, ids: torch.Tensor, types: torch.Tensor, real: torch.Tensor | None
    ) -> Iterator[torch.Tensor]:
        x, rope = self._enter(ids, types)
        for block in self.layers:
            x = block(x, rope, real)
            yield x

    def _enter(self, ids: torch.Tensor, types: torch.Tensor) -> tuple[torch.Tensor, Rope]:
        x, rope = self.embed(ids), None
        positions = torch.arange(ids.shape[1], device=ids.device)
        if self.config.token_types:
            x = x + self.embed_types(types)
        if self.config.positions == "learned":
            x = x + self.embed_positions(positions)
        elif self.config.positions == "rope":
            rope = self.rotary(positions, x.dtype)
        return self.norm(x) if self.config.post_norm else x, rope

    def to_inference(self, linear_factory: LinearFactory = fused_linear) -> None:
        """Replace every part by its inference form; `linear_factory` makes the linear layers."""
        for block in self.layers:
            block.to_inference(linear_factory)
            block.finalize_weights()
        self.norm = inference_norm(self.norm)
