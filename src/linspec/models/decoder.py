"""One decoder for Llama, Mistral, Qwen2, Qwen3, SmolLM and GPT-2: blocks of mixer and MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from linspec.config import DecoderConfig
from linspec.errors import ContextOverflow
from linspec.kernels.linear import fuse
from linspec.kernels.norm import prepare_norm
from linspec.mixers.base import Rope
from linspec.models.block import Block, make_norm
from linspec.models.padding import from_left, to_left
from linspec.rope import Rotary
from linspec.state import DecoderState
from linspec.step import Feed, Segment, depths, segments_of


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step computed for the nodes whose logits were asked for.

    hidden [P, D] are final normalised hidden states, logits [P, vocab]; `rows[i]` says which of the P
    belong to feed i.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    rows: list[slice]


class Decoder(nn.Module):
    """Token ids in, logits out. `forward` is the full form, `step` the inference form."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.width)
        elif config.positions == "rope":
            self.rotary = Rotary(config.rope, config.head_width)
        self.blocks = nn.ModuleList(self.make_block(i) for i in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()
        self.prepared = False

    def make_block(self, layer: int) -> Block:
        """The block of one layer."""
        return Block(self.config, layer)

    def tie(self) -> None:
        """Make parameters that are one in the checkpoint one in memory."""
        if self.config.tied_embeddings:
            self.head.weight = self.embed.weight

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Final normalised hidden states [B, T, D] of ids [B, T] at positions 0..T-1."""
        x, rope = self.enter(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in self.layers:
            x = block(x, rope)
        return self.leave(x)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """What the output layer takes: the last block's states, normalised."""
        x = self.norm(x)
        return x if self.config.logit_scale == 1.0 else x * self.config.logit_scale

    def enter(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, Rope]:
        """Embedded ids, and the rotation of their positions where there is one."""
        x = self.embed(ids)
        if self.config.positions == "learned":
            return x + self.embed_positions(positions), None
        if self.config.positions == "rope":
            return x, self.rotary(positions, x.dtype)
        return x, None

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, vocab] of ids [B, T]; `mask` [B, T] is true at real tokens.

        Rows may be padded at either end; logits at padding mean nothing.
        """
        if mask is None:
            return self.head(self.hidden(ids))
        ids, shifts = to_left(ids, mask)
        return self.head(from_left(self.hidden(ids), shifts))

    def full_logits(self, prompt: Sequence[int], outputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [B, vocab] behind `prompt` and each of B equally long outputs, by the full form."""
        ids = torch.tensor([[*prompt, *output] for output in outputs])
        return self.head(self.hidden(ids.to(self.embed.weight.device))[:, -1])

    def prepare(self) -> Decoder:
        """Turn this decoder into its inference form, in place; returns it.

        Projections of the same input become one product, with weights prepacked where that pays. The
        full form still works; training and saving do not. Calling it again changes nothing.
        """
        if self.prepared:
            return self
        self.eval().requires_grad_(False)
        for block in self.layers:
            block.prepare()
        self.norm = prepare_norm(self.norm)
        self.add_module("head", fuse(self.head))
        self.prepared = True
        return self

    def new_state(self, slots: int = 1) -> DecoderState:
        """Empty state for up to `slots` sequences, in the dtype and on the device of the weights."""
        weight = self.embed.weight
        mixers = [block.mixer for block in self.layers]
        return DecoderState(
            [mixer.row_spec() for mixer in mixers],
            slots,
            dtype=weight.dtype,
            device=weight.device,
            summed_keys=[mixer.summed_keys for mixer in mixers],
        )

    def open(
        self, prompt: Sequence[int], slot: int, state: DecoderState
    ) -> tuple[list[int], tuple[int, ...]]:
        """Make `slot` an empty sequence; returns the tokens to feed it, all of `prompt`, and no source."""
        state.reset(slot)
        return list(prompt), ()

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed], state: DecoderState) -> StepOutput:
        """Run new tokens of several slots against their committed state and stage them there.

        Feeds are in the order of their slots. Nothing committed changes: call `state.commit` with the
        accepted path afterwards. Raises ContextOverflow before any work when a sequence would pass
        the model's longest position.
        """
        segments = segments_of(feeds, state)
        places = [self._positions(feed, state) for feed in feeds]
        for feed in feeds:
            state.reserve(feed.slot, len(feed.tokens))
        device = self.embed.weight.device
        ids = torch.tensor([t for feed in feeds for t in feed.tokens], device=device)
        positions = torch.tensor([p for place in places for p in place], device=device)
        x, rope = self.enter(ids, positions)
        x = self.run(x, rope, segments, state)
        for segment in segments:
            for slot, parents in zip(segment.slot_range, segment.parents, strict=True):
                state.record(slot, parents)
        return self._outputs(x, feeds)

    def run(
        self, x: torch.Tensor, rope: Rope, segments: list[Segment], state: DecoderState
    ) -> torch.Tensor:
        """Packed nodes [M, D] through the step form of every block."""
        for block, (part, layer) in zip(self.layers, state.layers, strict=True):
            x = block.step(x, rope, segments, part, layer)
        return x

    def _positions(self, feed: Feed, state: DecoderState) -> list[int]:
        start = state.length(feed.slot)
        if feed.parents is None:
            places = list(range(start, start + len(feed.tokens)))
        else:
            places = [start + d for d in depths(feed.parents, state.staged(feed.slot))]
        limit = self.config.position_limit
        if limit is not None and max(places, default=0) >= limit:
            raise ContextOverflow(
                f"position {max(places)} is beyond this model's {limit} positions; shorten the prompt or "
                "max_tokens, or linearize the model: linear mixers have no such limit"
            )
        return places

    def _outputs(self, x: torch.Tensor, feeds: Sequence[Feed]) -> StepOutput:
        rows: list[slice] = []
        wanted: list[int] = []
        first = 0
        for feed in feeds:
            count = len(feed.tokens)
            keep = range(first if feed.all_logits else first + count - 1, first + count)
            rows.append(slice(len(wanted), len(wanted) + len(keep)))
            wanted += keep
            first += count
        if len(wanted) < first:
            x = x[torch.tensor(wanted, device=x.device)]
        hidden = self.leave(x)
        return StepOutput(hidden, self.head(hidden), rows)
