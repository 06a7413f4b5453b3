"""Small block drafters for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linspec.drafters.block_net import BlockConfig, BlockNet, Measured
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from tests.helpers import mixer_config

WIDTH, VOCAB = 48, 70
TARGET = DecoderConfig(
    vocab_size=VOCAB, width=WIDTH, layers=3, heads=2, kv_heads=1, head_width=24, mlp_width=40
)
SHAPE = BlockConfig(
    width=WIDTH,
    vocab_size=VOCAB,
    read=(0, 1),
    heads=4,
    kv_heads=2,
    head_width=16,
    mlp_width=40,
    depth=2,
    places=4,
    window=6,
    vocabulary=21,
    rank=8,
)


def make_target(mixer: str = "softmax", seed: int = 0) -> Decoder:
    """A random decoder whose outputs are not all one token."""
    shape = replace(TARGET, mixers=(mixer_config(mixer),) * TARGET.layers)
    return _randomised(Decoder(shape).eval(), seed, 0.3)


def _randomised(module: Any, seed: int, std: float) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        nn.init.normal_(weight, std=std, generator=generator)
    return module


def make_net(target: Decoder, shape: BlockConfig = SHAPE, seed: int = 1) -> BlockNet:
    """A drafter that computes something everywhere; its norms stay near ones."""
    generator = torch.Generator().manual_seed(seed)
    drafted = torch.randperm(shape.vocab_size, generator=generator)[: shape.vocabulary]
    net = BlockNet(
        shape,
        target,
        Measured([0.5] * shape.places, [1.5] * shape.places),
        drafted.sort().values.int(),
    )
    _randomised(net, seed, 0.2)
    for part in net.modules():
        if isinstance(part, nn.RMSNorm):
            with torch.no_grad():
                part.weight.add_(1)
    return net.requires_grad_(False).eval()
