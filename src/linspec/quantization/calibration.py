"""How large the inputs of linear layers are on real text: what decides which rounding errors matter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def input_statistics(model: nn.Module) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Yield sums of squares of every input of every linear layer, [K] each, over what runs inside."""
    found: dict[nn.Module, torch.Tensor] = {}

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = inputs[0].detach().float().flatten(0, -2).square().sum(0)
        found[layer] = found[layer] + squares if layer in found else squares

    hooks = [
        layer.register_forward_pre_hook(note)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
