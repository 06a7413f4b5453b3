"""The tokens that a round could commit, and how sure the model is of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from linspec.diffusion.canvas import Canvas
from linspec.diffusion.predictions import Predictions
from linspec.utils.sizes import check_choice


@dataclass(frozen=True)
class Candidates:
    """A token for each undecided position of the block, ascending.

    Attributes:
        positions: [M].
        tokens: [M], the likeliest ones, or those that were drawn.
        logits: [M, vocab], as the model gave them.
        uniforms: so many numbers from [0, 1) of the request's own.
        canvas: which they are for.
        predictions: what the forward says of other positions too.
    """

    positions: Tensor
    tokens: Tensor
    logits: Tensor
    uniforms: Callable[[int], Tensor]
    canvas: Canvas
    predictions: Predictions

    @cached_property
    def probabilities(self) -> Tensor:
        """[M, vocab], without temperature."""
        return self.logits.softmax(-1)

    @cached_property
    def confidence(self) -> Tensor:
        """[M]: the probability of each token."""
        return self.probabilities.gather(-1, self.tokens[:, None])[:, 0]

    @cached_property
    def margin(self) -> Tensor:
        """[M]: by how much the likeliest token is likelier than the next one."""
        best = self.probabilities.topk(2).values
        return best[:, 0] - best[:, 1]

    @cached_property
    def entropy(self) -> Tensor:
        """[M]: of the distribution of each position, in nats."""
        return torch.special.entr(self.probabilities).sum(-1)

    @cached_property
    def lots(self) -> Tensor:
        """[M]: a random number of each position, drawn once: the order of what is left stays as it is."""
        lots, places = self.canvas.lots, self.positions.tolist()
        new = [position for position in places if position not in lots]
        lots.update(zip(new, self.uniforms(len(new)).tolist(), strict=True))
        return torch.tensor([lots[position] for position in places], dtype=torch.float64)

    def where(self, chosen: Tensor) -> dict[int, int]:
        """The tokens at the positions that are chosen."""
        pairs = self.positions[chosen].tolist(), self.tokens[chosen].tolist()
        return dict(zip(*pairs, strict=True))

    def still_open(self, canvas: Canvas, uniforms: Callable[[int], Tensor]) -> Candidates:
        """Those that are undecided on a later canvas; what is known of them is not computed again."""
        left = torch.tensor([p in canvas.undecided for p in self.positions.tolist()])
        found = replace(
            self,
            positions=self.positions[left],
            tokens=self.tokens[left],
            logits=self.logits[left],
            uniforms=uniforms,
            canvas=canvas,
        )
        for name in ("confidence", "margin", "entropy"):
            if name in self.__dict__:
                found.__dict__[name] = self.__dict__[name][left]
        return found


# what is committed first: the position with the highest number
ORDERS: dict[str, Callable[[Candidates], Tensor]] = {
    "confidence": lambda candidates: candidates.confidence,
    "margin": lambda candidates: candidates.margin,
    "entropy": lambda candidates: -candidates.entropy,
    "random": lambda candidates: candidates.lots,
    "left": lambda candidates: -candidates.positions,
}


# orders that are known before a forward, by the canvas
KNOWN_ORDERS = ("left", "random")


def known_order(order: str, canvas: Canvas) -> list[int]:
    """What is open, in one of KNOWN_ORDERS; empty before all of it has a lot."""
    if order == "left":
        return canvas.open
    if not canvas.lots.keys() >= set(canvas.open):
        return []
    # `highest` takes the first of equal ones, and so does a stable sort
    return sorted(canvas.open, key=canvas.lots.__getitem__, reverse=True)


def check_order(name: str, order: str) -> None:
    """Raise ConfigError unless `order` is one of ORDERS."""
    check_choice(name, order, tuple(ORDERS))


def highest(scores: Tensor, count: int) -> Tensor:
    """[M], true at the `count` highest scores; among equal ones the first."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.sort(descending=True, stable=True).indices[:count]] = True
    return chosen
