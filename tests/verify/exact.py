"""The exact law of what draws random numbers: every decision is taken both ways, with its probability.

law(lambda sampler: verifier.accept(tree, logits, sampler).path)    # {path: probability}
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from linspec.decoding.sampling import Sampler, SamplingParams

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Uniform:
    """A uniform number times `scale` that is not known yet: comparing it decides."""

    sampler: ExactSampler
    scale: float = 1.0

    def __mul__(self, factor: float) -> Uniform:
        return Uniform(self.sampler, self.scale * factor)

    def __lt__(self, bound: float) -> bool:
        below = min(1.0, max(0.0, bound / self.scale))
        return self.sampler.decide([1 - below, below]) == 1


class ExactSampler(Sampler):
    """Takes the decisions of `script`, then the first that is possible; notes what else was possible."""

    def __init__(self, script: tuple[int, ...], vocab_size: int) -> None:
        super().__init__(SamplingParams(temperature=1.0), (), vocab_size)
        self.script, self.taken = script, ()
        self.probability, self.open = 1.0, list[tuple[int, ...]]()

    def decide(self, weights: Sequence[float]) -> int:
        possible = [i for i, weight in enumerate(weights) if weight > 0]
        if len(self.taken) < len(self.script):
            choice = self.script[len(self.taken)]
        else:
            choice = possible[0]
            self.open += [(*self.taken, other) for other in possible[1:]]
        self.taken = (*self.taken, choice)
        self.probability *= weights[choice] / math.fsum(weights)
        return choice

    def probabilities(self, logits: Tensor, extra: Sequence[int] = ()) -> Tensor:
        return logits.double().softmax(-1)

    def uniform(self) -> Uniform:  # type: ignore[override]
        return Uniform(self)

    def draw(self, probabilities: Tensor) -> int:
        return self.decide(probabilities.tolist())


def law(run: Callable[[ExactSampler], T], vocab_size: int = 1) -> dict[T, float]:
    """The probability of each result of `run`, which may ask a sampler of no prompt for anything."""
    found: dict[T, float] = defaultdict(float)
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        sampler = ExactSampler(scripts.pop(), vocab_size)
        result = run(sampler)
        found[result] += sampler.probability
        scripts += sampler.open
    return dict(found)


class Table:
    """A random distribution [V] behind every prefix, some of its tokens impossible."""

    def __init__(self, vocab_size: int, seed: int, zeros: float = 0.2) -> None:
        self.vocab_size, self.zeros = vocab_size, zeros
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, prefix: Sequence[int]) -> Tensor:
        key = tuple(prefix)
        if key not in self.rows:
            rows = torch.rand(3, self.vocab_size, generator=self.generator, dtype=torch.float64)
            weights = rows[0] ** 3 * (rows[1] > self.zeros)
            weights[int(rows[2].argmax())] += 0.05
            self.rows[key] = weights / weights.sum()
        return self.rows[key]
