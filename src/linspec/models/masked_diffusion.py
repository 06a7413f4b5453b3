"""Masked-diffusion language models (Nie et al. 2025, arXiv 2502.09992; Ye et al. 2025, arXiv 2508.15487).

A decoder without its causal mask: all tokens see each other, or all of their block and of those before it
(`block_length`), and at a masked position the logits say which token it hides. There is no input for the
time: how much is masked, the model sees.

Mixers other than softmax are computed in their bidirectional form: sums over all of the canvas, exact weights
for near groups on both sides, a centred convolution.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from linspec.decoding.step import LOGITS, StepInput, StepOutput, Want
from linspec.errors import ConfigError
from linspec.mixers.base import Rope
from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.layer_path import LayerPath
from linspec.models.one_call import OneCall
from linspec.models.padding import from_left, to_left
from linspec.models.watched import run_watched
from linspec.state.dense_group import DenseGroup
from linspec.state.sequence_states import SequenceStates


class MaskedDiffusion(Decoder):
    """Token ids with masks in, logits out. A step computes positions again, in place of their entries."""

    config: DiffusionConfig

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, vocab] of ids [B, T], as the output layer gives them; `mask` is true at real tokens.

        Rows may be padded at either end; logits at padding mean nothing.
        """
        return self.head(self._states(ids, mask))

    def _states(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            seen = self._earlier_blocks(ids)
            return self.hidden(ids) if seen is None else self._hidden(ids, seen)
        ids, shifts = to_left(ids, mask)
        real = torch.arange(ids.shape[1], device=ids.device) < mask.sum(1, keepdim=True)
        seen = self._earlier_blocks(ids)
        hidden = self._hidden(ids, real if seen is None else seen & real[:, None])
        return from_left(hidden, shifts)

    def _hidden(self, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """`hidden` of tokens that see those that `seen`, [B, T] or [B, T, T], is true at."""

        def among_seen(block: Block, x: torch.Tensor, rope: Rope) -> torch.Tensor:
            x = x + block.mixer(block.mixer_norm(x), rope, seen)
            return x + block.mlp(block.mlp_norm(x))

        return self.hidden(ids, among_seen)

    def _earlier_blocks(self, ids: torch.Tensor) -> torch.Tensor | None:
        """[1, T, T], true where a query sees a key; None if all see all."""
        if self.config.block_length is None:
            return None
        blocks = torch.arange(ids.shape[1], device=ids.device) // self.config.block_length
        return (blocks[:, None] >= blocks)[None]

    def predicted(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, vocab] of the token that stands at each position itself.

        With a logit shift nothing is said of the first one: its logits are those of its own row.
        """
        return self.head(self.telling(ids, mask))

    def telling(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The states [B, T, D] of which `predicted` is the output layer's."""
        states = self._states(ids, mask)
        if not self.config.logit_shift:
            return states
        return torch.cat((states[:, :1], states[:, :-1]), dim=1)

    def with_masks(self, batch: torch.Tensor) -> torch.Tensor:
        """Token ids, the negative ones replaced by the mask token."""
        return batch.masked_fill(batch < 0, self.config.mask_id)

    def new_state(
        self,
        slots: int = 1,
        kv: str = "float",
        *,
        layers: Collection[int] | None = None,
        offload: Path | None = None,
    ) -> SequenceStates:
        """As a decoder's; what kernels keep beside the entries of a canvas counts from the start."""
        state = super().new_state(slots, kv, layers=layers, offload=offload)
        if isinstance(self.native, OneCall) and layers is None and state.in_kernels:
            self.native.keep_sums(state)
        return state

    @torch.inference_mode()
    def step(
        self,
        inputs: Sequence[StepInput],
        state: SequenceStates,
        *,
        layers: Collection[int] | None = None,
        want: Want = LOGITS,
    ) -> StepOutput:
        """As a decoder's, for tokens that overwrite and see all positions.

        Raises ConfigError for others: a token that is staged would not see what stands behind it.
        """
        for each in inputs:
            if each.overwrite is None or each.causal:
                raise ConfigError(
                    f"slot {each.slot} was fed tokens that see only what stands before them, which a "
                    "masked-diffusion model does not compute; decode it with the loop 'masked-diffusion'"
                )
        length = self.config.block_length
        if length is not None:
            inputs = [replace(each, blocks=length) for each in inputs]
        return super().step(inputs, state, layers=layers, want=want)

    def run(
        self,
        x: torch.Tensor,
        ropes: Sequence[Rope],
        dense_groups: list[DenseGroup],
        state: SequenceStates,
        path: LayerPath,
    ) -> torch.Tensor:
        if all(group.watch is None for group in dense_groups):
            return super().run(x, ropes, dense_groups, state, path)
        return run_watched(self, x, dense_groups, state, path)
