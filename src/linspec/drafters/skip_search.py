"""The search for sub-layers that a draft can do without (SWIFT, Xia et al. 2024, arXiv 2410.06916).

    search = SkipSearch(units=28, size=7)
    candidate = search.suggest()
    # score: the share of tokens that a draft without the set got right
    search.told(candidate, score)
    search.best, search.over

Sets are tuples of numbers of sub-layers in ascending order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from linspec.errors import ConfigError, LinspecError
from linspec.utils.border import STRICT, parse, read_json
from linspec.utils.files import replace_text

SkipSet = tuple[int, ...]

# every so many suggestions one is thought about
_THOUGHT = 25
# of the Gaussian process: noise, weight of the uncertainty, newest scores that are used, sets to choose among
_NOISE, _KAPPA, _MEMORY, _CHOICE = 1e-2, 2.5, 300, 256


@dataclass(kw_only=True)
class Progress:
    """How far a search is. misses: suggestions in a row that were no better."""

    skipped: SkipSet
    score: float = 0.0
    trials: int = 0
    misses: int = 0
    over: bool = False
    __pydantic_config__ = STRICT


class SkipSearch:
    """Random sets, now and then one that a Gaussian process over the scores suggests; the best is kept.

    goal: the search ends with a score above it; patience: after so many suggestions in a row that were no
    better; trials: after so many in all.
    """

    def __init__(
        self,
        units: int,
        size: int,
        *,
        goal: float = 0.95,
        patience: int = 300,
        trials: int = 1000,
        seed: int = 0,
    ) -> None:
        self.units, self.size = units, size
        self.goal, self.patience, self.trials = goal, patience, trials
        self.progress = Progress(skipped=evenly(units, size))
        self._random = random.Random(seed)
        self._scores: list[tuple[SkipSet, float]] = []

    @property
    def best(self) -> SkipSet:
        """The best set so far; first one of evenly spaced sub-layers."""
        return self.progress.skipped

    @property
    def over(self) -> bool:
        """Whether nothing more is to be tried."""
        return self.progress.over

    def suggest(self) -> SkipSet:
        """The next set to try: first the one that is in use, then others."""
        if not self.progress.trials:
            return self.best
        if self.progress.trials % _THOUGHT == 0 and len(self._scores) > 1:
            return self._thought()
        return self._drawn()

    def _drawn(self) -> SkipSet:
        return tuple(sorted(self._random.sample(range(self.units), self.size)))

    def _thought(self) -> SkipSet:
        """Of random sets and neighbours of the best one, that with the highest upper confidence bound."""
        choice = [self._drawn() for _ in range(_CHOICE)] + [
            self._neighbour() for _ in range(_CHOICE)
        ]
        known = self._scores[-_MEMORY:]
        x, y = self._rows([each for each, _ in known]), torch.tensor([s for _, s in known]).double()
        mean, spread = y.mean(), y.std().clamp_min(1e-3)
        kernel = _kernel(x, x, self.size) + _NOISE * torch.eye(len(x), dtype=x.dtype)
        factor = torch.linalg.cholesky(kernel)
        across = _kernel(self._rows(choice), x, self.size)
        guess = across @ torch.cholesky_solve(((y - mean) / spread)[:, None], factor)[:, 0]
        seen = torch.linalg.solve_triangular(factor, across.T, upper=False).square().sum(0)
        bound = guess + _KAPPA * (1 - seen).clamp_min(0).sqrt()
        return choice[int(bound.argmax())]

    def _neighbour(self) -> SkipSet:
        """The best set with one sub-layer exchanged."""
        rest = [unit for unit in range(self.units) if unit not in self.best]
        if not rest or not self.best:
            return self.best
        out, into = self._random.choice(self.best), self._random.choice(rest)
        return tuple(sorted({*self.best, into} - {out}))

    def _rows(self, sets: Sequence[SkipSet]) -> torch.Tensor:
        rows = torch.zeros(len(sets), self.units, dtype=torch.float64)
        for row, each in zip(rows, sets, strict=True):
            row[list(each)] = 1
        return rows

    def told(self, candidate: SkipSet, score: float) -> bool:
        """Take note of a score in 0..1; whether `candidate` is now the best set."""
        now = self.progress
        self._scores.append((candidate, score))
        now.trials += 1
        better = score > now.score
        if better:
            now.skipped, now.score, now.misses = candidate, score, 0
        else:
            now.misses += 1
        now.over = now.score > self.goal or now.misses > self.patience or now.trials >= self.trials
        return better

    # ---- on disk

    def save(self, path: Path) -> None:
        """Write the progress; raises CheckpointError when the disk refuses."""
        replace_text(path, json.dumps(asdict(self.progress)) + "\n")

    def load(self, path: Path) -> None:
        """Go on from a file; raises LinspecError for one that is of another search or damaged."""
        found = parse(Progress, read_json(path), f"{path} is no search for sub-layers")
        sound = (
            len(set(found.skipped)) == self.size
            and list(found.skipped) == sorted(found.skipped)
            and all(0 <= unit < self.units for unit in found.skipped)
        )
        if not sound or not 0 <= found.score <= 1:
            raise ConfigError(
                f"{path} skips {list(found.skipped)} with a score of {found.score}; this search skips "
                f"{self.size} of the sub-layers 0..{self.units - 1}, with a score in 0..1. Remove the file"
            )
        self.progress = found

    def resume(self, path: Path) -> None:
        """As `load`, where there is a sound file."""
        try:
            self.load(path)
        except LinspecError:
            return


def evenly(units: int, size: int) -> SkipSet:
    """`size` of `units` numbers, evenly spaced."""
    return tuple(int((i + 0.5) * units / size) for i in range(size))


def _kernel(a: torch.Tensor, b: torch.Tensor, size: int) -> torch.Tensor:
    """How alike sets are: 1 for equal ones."""
    return torch.exp(-torch.cdist(a, b).square() / max(1, size))
