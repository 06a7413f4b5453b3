"""What a training step asks of a model: the tokens that come, given those before them."""

from __future__ import annotations

import torch

from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.models.t5 import T5

# models that predict text
Predictor = Decoder | T5


def next_tokens(model: Predictor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, vocab], float32, and the N tokens that they should name, of windows [B, T + 1].

    A decoder predicts every token of a window from those before it. An encoder-decoder reads the first
    half and predicts the second (prefix language modelling, Raffel et al. 2020, arXiv 1910.10683).
    """
    if isinstance(model, T5):
        source, target = batch.tensor_split(2, dim=1)
        start = target.new_full((len(target), 1), model.config.start_id)
        logits = model(source, torch.cat((start, target[:, :-1]), dim=1))
    else:
        target = batch[:, 1:]
        logits = model(batch[:, :-1])
    return logits.flatten(0, 1).float(), target.flatten()


def blocks_of(model: Predictor) -> list[Block]:
    """Every block with a mixer, in the order of the configuration's `mixers`."""
    if isinstance(model, T5):
        return [*model.encoder.layers, *model.decoder.layers]
    return model.layers
