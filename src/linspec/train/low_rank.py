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

# the matrices of a block
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


class LowRank(nn.Module):
    """weight + up · down."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

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
            parametrize.register_parametrization(
                layer, "weight", _nothing_yet(layer.weight, rank, generator)
            )
    return student


def _nothing_yet(weight: torch.Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """A change of `weight` by zero."""
    rows, columns = weight.shape
    down = torch.randn(rank, columns, generator=generator) * columns**-0.5
    return LowRank(torch.zeros(rows, rank).to(weight), down.to(weight))


def add_row(student: Decoder, row: int) -> Decoder:
    """Make a change of one row of the embedding trainable, in place; a tied output layer has it too."""
    weight = student.embed.weight
    up = torch.zeros(len(weight), 1).to(weight)
    up[row] = 1
    change = LowRank(up, torch.zeros(1, weight.shape[1]).to(weight))
    change.up.requires_grad_(False)
    for layer in (student.embed, student.head):
        if layer.weight is weight:
            parametrize.register_parametrization(layer, "weight", change)
    return student


def factors(student: Decoder) -> Factors:
    """The factors (up, down) of every changed layer; of layers that share theirs, the first."""
    found: Factors = {}
    seen = set[LowRank]()
    for name, _, change in _changed(student):
        if change not in seen:
            found[name] = (change.up.detach(), change.down.detach())
        seen.add(change)
    return found


def merge_low_rank(student: Decoder) -> Decoder:
    """Make the changes part of plain weights, in place."""
    done = set[LowRank]()
    for _, layer, change in list(_changed(student)):
        # weights that are shared are changed once
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=change not in done)
        done.add(change)
    return student


def _linears(model: Decoder) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("blocks."):
            yield name, layer


def _changed(model: Decoder) -> Iterator[tuple[str, nn.Module, LowRank]]:
    for name, layer in list(model.named_modules()):
        if parametrize.is_parametrized(layer, "weight"):
            change = layer.parametrizations["weight"][0]
            if isinstance(change, LowRank):
                yield name, layer, change
