"""What a training step asks of a model: the tokens that come, given those before them."""

from __future__ import annotations

import torch

from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.models.encoder import Encoder
from linspec.models.model_types import type_of
from linspec.models.t5 import T5
from linspec.train.pieces import Output

# models that predict text, and all that are linearized
Predictor = Decoder | T5
Stack = Predictor | Encoder


def next_tokens(model: Predictor, batch: torch.Tensor) -> tuple[torch.Tensor, Output, torch.Tensor]:
    """Final states [B, N, D], the output layer, and the tokens [B, N] to name there, of windows [B, T + 1].

    A decoder predicts every token of a window from those before it, an encoder-decoder the second half
    from the first.
    """
    kind = type_of(model)
    assert kind.predict is not None and kind.head is not None, "an encoder predicts no text"
    states, target = kind.predict(model, batch)
    return states, Output.of(kind.head(model)), target


def blocks_of(model: Stack) -> list[Block]:
    """Every block with a mixer, in the order of the configuration's `mixers`."""
    return type_of(model).blocks(model)
