"""A decoder made by hand: the next token is the one PERIOD - 1 places back, whatever stands between."""

from __future__ import annotations

import math

import torch

from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder

PERIOD = 5
SYMBOLS = 12
_WIDTH, _HEAD = 16, 16


def copying(layers: int = 2, dtype: torch.dtype = torch.float32) -> Decoder:
    """Its last layer attends by position alone, so it also goes on from embeddings of no token."""
    config = DecoderConfig(
        vocab_size=SYMBOLS,
        width=_WIDTH,
        layers=layers,
        heads=1,
        kv_heads=1,
        head_width=_HEAD,
        mlp_width=8,
        qkv_bias=True,
        tied_embeddings=False,
    )
    model = Decoder(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.zero_()
        model.embed.weight.copy_(torch.eye(SYMBOLS, _WIDTH))
        model.head.weight.copy_(torch.eye(SYMBOLS, _WIDTH) * 5)
        mixer = model.layers[-1].mixer
        half = _HEAD // 2
        angles = (PERIOD - 1) * config.rope.theta ** (-torch.arange(half) / half)
        mixer.k.bias[:half] = 1.0
        mixer.q.bias.copy_(torch.cat((angles.cos(), -angles.sin())) * 100 * math.sqrt(_HEAD))
        mixer.v.weight.copy_(torch.eye(_HEAD, _WIDTH))
        mixer.o.weight.copy_(torch.eye(_WIDTH, _HEAD) * 10)
    return model.eval().requires_grad_(False)


def periodic(length: int, seed: int = 0) -> list[int]:
    """Tokens that repeat those PERIOD places before."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randperm(SYMBOLS, generator=generator)[:PERIOD].tolist()
    return [unit[place % PERIOD] for place in range(length)]
