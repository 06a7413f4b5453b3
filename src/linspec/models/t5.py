"""T5 (Raffel et al. 2020, arXiv 1910.10683): an encoder, and a decoder that attends to it.

    model = load_seq2seq("path/to/t5")
    logits = model(source_ids, target_ids, source_mask)

The decoder is the same as everywhere else: its self-attention can be any mixer, its state is staged
and committed, and trees of draft tokens are verified in one step. `open` reads a source into a slot.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from linspec.decoding.step import LOGITS, StepInput, StepOutput, Want
from linspec.errors import InputError
from linspec.models.config import Seq2SeqConfig
from linspec.models.cross import CrossDecoder, sources_of
from linspec.models.encoder import Encoder
from linspec.models.padding import to_left
from linspec.state.sequence_states import SequenceStates


class T5(nn.Module):
    """Source ids and target ids in, logits of what follows the target out."""

    continues_prompt = False

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.decoder = CrossDecoder(config.decoder)
        self.tie()
        self.is_inference = False
        self.native = None

    def tie(self) -> None:
        """Make parameters that are one in the checkpoint one in memory."""
        self.decoder.embed = self.encoder.embed
        self.decoder.tie()
        for stack in (self.encoder, self.decoder):
            # the first layer that has the table lends it to the others
            mixers = [block.mixer for block in stack.layers if block.mixer.relative is not None]
            for mixer in mixers[1:]:
                mixer.relative = mixers[0].relative

    @property
    def embed(self) -> nn.Embedding:
        """The embedding that both sides share."""
        return self.encoder.embed

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    def encode(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [B, S, D] of padded sources [B, S], their tokens moved to the front; and where.

        The second is true [B, S] at real tokens, None when all are. Raises InputError for a row
        without any.
        """
        if mask is None:
            return self.encoder(ids), None
        if not bool(mask.any(1).all()):
            raise InputError("a source has no tokens; give at least one")
        ids, _ = to_left(ids, mask)
        real = torch.arange(ids.shape[1], device=ids.device) < mask.sum(1)[:, None]
        return self.encoder(ids, real), real

    def forward(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        source_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, vocab] behind each token of target [B, T], for source [B, S].

        source_mask [B, S] is true at real tokens; targets may be padded at the end. A target begins
        with the configuration's `start_id`.
        """
        sources = self.decoder.sources(*self.encode(source, source_mask))
        return self.decoder.head(self.decoder.decode(target, sources))

    def full_logits(self, prompt: Sequence[int], outputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [B, vocab] behind each of B equally long outputs for the source `prompt`."""
        device = self.device
        source = torch.tensor([list(prompt)], device=device).expand(len(outputs), -1)
        target = torch.tensor([[self.config.start_id, *output] for output in outputs])
        return self(source, target.to(device))[:, -1]

    def to_inference(self) -> T5:
        """Turn this model into its inference form, in place; returns it."""
        if not self.is_inference:
            self.eval().requires_grad_(False)
            self.encoder.to_inference()
            self.decoder.to_inference()
            self.is_inference = True
        return self

    @property
    def dtype(self) -> torch.dtype:
        """That of the decoder."""
        return self.decoder.dtype

    @property
    def kernels(self) -> str:
        """Those of the decoder."""
        return self.decoder.kernels

    @property
    def keeps_cache(self) -> bool:
        """Whether a layer of the decoder does."""
        return self.decoder.keeps_cache

    def new_state(
        self, slots: int = 1, kv: str = "float", *, offload: Path | None = None
    ) -> SequenceStates:
        """Empty state for up to `slots` outputs; `open` or `read` gives each slot its source."""
        return self.decoder.new_state(slots, kv, offload=offload)

    def open(
        self, prompt: Sequence[int], slot: int, state: SequenceStates
    ) -> tuple[list[int], tuple[int, ...]]:
        """Make `slot` an empty output for the source `prompt`; returns what to feed it, and the source."""
        self.read([prompt], [slot], state)
        return [self.config.start_id], tuple(prompt)

    @torch.inference_mode()
    def read(
        self, sources: Sequence[Sequence[int]], slots: Sequence[int], state: SequenceStates
    ) -> None:
        """Encode `sources` in one batch and make each the source of its slot, which is emptied.

        Raises InputError for a source without tokens.
        """
        lengths = [len(source) for source in sources]
        if not all(lengths):
            raise InputError("a source has no tokens; give at least one")
        ids = torch.zeros(len(sources), max(lengths), dtype=torch.long, device=self.device)
        for row, source in enumerate(sources):
            ids[row, : len(source)] = torch.tensor(source)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        layers = self.decoder.sources(*self.encode(ids, mask.to(ids.device)))
        keys = torch.stack([layer.keys for layer in layers])
        values = torch.stack([layer.values for layer in layers])
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            state.reset(slot)
            sources_of(state).fill(slot, keys[:, row, :, :length], values[:, row, :, :length])

    def step(
        self,
        inputs: Sequence[StepInput],
        state: SequenceStates,
        *,
        layers: Collection[int] | None = None,
        want: Want = LOGITS,
    ) -> StepOutput:
        """One step of the decoder; see `Decoder.step`."""
        return self.decoder.step(inputs, state, layers=layers, want=want)
