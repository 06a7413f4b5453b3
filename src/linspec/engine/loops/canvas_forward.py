"""A sequence of masked diffusion on its way, and what it has in a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.diffusion import Canvas
from linspec.diffusion.base import CountedWatch


@dataclass(slots=True)
class Denoising:
    """A sequence on its way.

    later: masks that are not laid out yet. held: tokens up to an end that was reached, while later blocks are
    computed. drafts: what the canvas may be after one more round, after two, and so on. sures: how likely the
    last forward found what each of them has. drafting: seconds in which they were made.
    """

    sequence: RunningSequence
    canvas: Canvas
    later: int
    held: tuple[int, ...] | None = None
    drafts: list[Canvas] = field(default_factory=list)
    sures: list[float] = field(default_factory=list)
    drafting: float = 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What a step computes of a canvas: the positions, and those that have logits."""

    canvas: Canvas
    rows: list[int]
    read: list[int]
    watch: CountedWatch | None

    def given(self, slot: int, branch: int) -> StepInput:
        """Tokens and masks, which see all positions."""
        tokens = [self.canvas.tokens[row] for row in self.rows]
        read = set(self.read)
        return StepInput(
            slot,
            tokens,
            overwrite=self.rows,
            causal=False,
            logits_of=[number for number, row in enumerate(self.rows) if row in read],
            branch=branch,
            watch=self.watch,
        )

    def computed(self, layers: int) -> int:
        """Positions × layers, once the step has run."""
        return len(self.rows) * layers if self.watch is None else self.watch.computed


@dataclass(frozen=True, slots=True)
class Forward:
    """What one sequence has in a step: readings of its canvas, and of each draft in a branch behind it."""

    of: Denoising
    readings: list[Reading]

    @property
    def given(self) -> list[StepInput]:
        """An input for each reading."""
        slot = self.of.sequence.slot
        return [each.given(slot, branch) for branch, each in enumerate(self.readings)]

    @property
    def positions(self) -> int:
        """Of all branches together."""
        return sum(len(each.rows) for each in self.readings)

    def computed(self, layers: int) -> int:
        """Positions × layers of all branches together, once the step has run."""
        return sum(each.computed(layers) for each in self.readings)
