"""The output layer, whose logits may be capped (Gemma 2)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from linspec.mixers.ops.exact import capped
from linspec.mixers.projections import LinearFactory
from linspec.models.config import DecoderConfig


class CappedLinear(nn.Linear):
    """Logits x as cap·tanh(x / cap)."""

    cap: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return capped(super().forward(x), self.cap)


def make_head(config: DecoderConfig) -> nn.Linear:
    """The output layer of a new decoder."""
    return with_cap(nn.Linear(config.width, config.vocab_size, bias=False), config.logit_cap)


def with_cap(head: nn.Linear, cap: float) -> nn.Linear:
    """`head` itself, or a layer of its weights with capped logits."""
    if not cap or isinstance(head, CappedLinear):
        return head
    made = CappedLinear(head.in_features, head.out_features, bias=False, device="meta")
    made.weight, made.cap = head.weight, cap
    return made


def cap_of(head: nn.Module) -> float:
    """The cap of a head that is not in its inference form; 0 for none."""
    return head.cap if isinstance(head, CappedLinear) else 0.0


def inference_head(head: nn.Module, linear_factory: LinearFactory) -> nn.Module:
    """The inference form of a head."""
    made = linear_factory(head)
    if cap := cap_of(head):
        # a hook, because drafters and kernels know the layer by its class
        made.register_forward_hook(partial(_cap_output, cap=cap))
    return made


def _cap_output(layer: nn.Module, inputs: Any, output: torch.Tensor, *, cap: float) -> torch.Tensor:
    return capped(output, cap)
