"""Low-rank changes of frozen weights, as what is trained and as what is shipped.

    add_low_rank(student, {"v": 32, "o": 32, "gate": 16, "up": 16, "down": 16}, seed=0)
    ...
    delta = factors(student)        # {"blocks.0.mixer.v": (up [out, r], down [r, in]), ...}

The change is added to the weight (Hu et al. 2021, LoRA, with α = r), not to the layer's output: a step
computes no more than the plain model does, and what is trained is what is applied when a delta is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from linspec.errors import ConfigError
from linspec.models.decoder import Decoder

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


class LowRank(nn.Module):
    """weight + up · down; up starts at zero."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        self.up = nn.Parameter(torch.zeros(rows, rank).to(weight))
        self.down = nn.Parameter(down.to(weight))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down)


def add_low_rank(student: Decoder, ranks: Mapping[str, int], seed: int) -> Decoder:
    """Freeze `student` and make a low-rank change of its layers called as in `ranks` trainable, in place."""
    student.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in _linears(student):
        rank = ranks.get(name.rsplit(".", 1)[-1], 0)
        if rank > min(layer.weight.shape):
            raise ConfigError(
                f"rank {rank} is more than {name} of {list(layer.weight.shape)} has; choose a smaller one"
            )
        if rank:
            change = LowRank(layer.weight, rank, generator)
            parametrize.register_parametrization(layer, "weight", change)
    return student


def factors(student: Decoder) -> Factors:
    """The factors (up, down) of every changed layer."""
    return {
        name: (change.up.detach(), change.down.detach())
        for name, layer in _linears(student)
        if (change := _change(layer)) is not None
    }


def merge_low_rank(student: Decoder) -> Decoder:
    """Make the changes part of plain weights, in place."""
    for _, layer in _linears(student):
        if _change(layer) is not None:
            parametrize.remove_parametrizations(layer, "weight")
    return student


def _linears(model: Decoder) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("blocks."):
            yield name, layer


def _change(layer: nn.Linear) -> LowRank | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    change = layer.parametrizations["weight"][0]  # type: ignore[index]
    return change if isinstance(change, LowRank) else None
