"""dKV-Cache: what is decided is kept, one forward after it was computed as a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from linspec.diffusion.base import CACHES, CachePolicy
from linspec.diffusion.canvas import Canvas
from linspec.utils.options import option
from linspec.utils.sizes import check_choice, check_size

_PAPER = "Ma et al. 2025, arXiv 2505.15781"
_SHIFTS = ("un", "un_right", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayedOptions:
    """When everything is computed, what is kept, and when it is kept."""

    every: int = option(
        "forwards of a block from one that computes everything to the next", default=8, short=True
    )
    prompt: str = option("refreshed: with the rest; frozen: computed once", default="refreshed")
    delay: int = option(
        "forwards that compute a token as a word before it is kept; with 0 what is kept is that of the mask",
        default=1,
    )
    shift: str = option(
        "with a logit shift, what must be decided before a row is kept: un, the token behind it; right, its "
        "own; un_right, both",
        default="un",
    )
    across: bool = option(
        "whether what is kept stays for the next block; the published code starts anew",
        default=False,
    )

    def __post_init__(self) -> None:
        check_size("every", self.every)
        check_size("delay", self.delay, least=0)
        check_choice("prompt", self.prompt, ("refreshed", "frozen"))
        check_choice("shift", self.shift, _SHIFTS)


@CACHES.register(
    "dkv",
    summary="decided tokens are kept one forward after they were computed as words; approximate",
    paper=_PAPER,
    options=DelayedOptions,
)
class Delayed(CachePolicy):
    """Masks are computed in every forward.

    With every=1 a frozen prompt is all that is kept: the published variant for long prompts (prefill).
    """

    options: DelayedOptions

    def rows(self, canvas: Canvas) -> Sequence[int]:
        step = canvas.forwards if self.options.across else canvas.step
        rows = refreshed(canvas, self.options.prompt)
        if canvas.new or step <= 1 or step % self.options.every == 0:
            return rows
        return [row for row in rows if self._age(canvas, row) <= self.options.delay]

    def _age(self, canvas: Canvas, row: int) -> float:
        """Forwards since all was decided that must be before a row is kept."""
        # the last row says nothing of a token behind it
        behind = min(row + canvas.logit_shift, len(canvas) - 1)
        decided = {"un": {behind}, "un_right": {row, behind}, "right": {row}}[self.options.shift]
        return min(canvas.age(position) for position in decided)


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyOptions:
    """When everything is computed, and what is computed beside what is decided next."""

    every: int = option(
        "forwards of a block from one that computes everything to the next", default=2, short=True
    )
    window: int = option("masks beside each token that is decided next", default=4)
    prompt: str = option("refreshed: with the rest; frozen: computed once", default="refreshed")

    def __post_init__(self) -> None:
        check_size("every", self.every)
        check_size("window", self.window, least=0)
        check_choice("prompt", self.prompt, ("refreshed", "frozen"))


@CACHES.register(
    "dkv-greedy",
    summary="compute what is decided next, what was decided last and a few masks; approximate",
    paper=_PAPER,
    options=GreedyOptions,
)
class Greedy(CachePolicy):
    """Other masks are kept too, so a forward computes a number of rows that no length changes."""

    options: GreedyOptions
    goes_ahead = True

    def rows(self, canvas: Canvas) -> Sequence[int]:
        if canvas.new or canvas.step % self.options.every == 0:
            return refreshed(canvas, self.options.prompt)
        near = (each for p in canvas.ahead for each in self._near(canvas, p))
        return sorted({*canvas.ahead, *canvas.fresh, *near})

    def _near(self, canvas: Canvas, position: int) -> list[int]:
        """The nearest masks, by turns from the left and from the right."""
        masks = canvas.undecided.difference(canvas.ahead)
        left = sorted((p for p in masks if p < position), reverse=True)
        right = sorted(p for p in masks if p > position)
        return list(by_turns(left, right))[: self.options.window]


def refreshed(canvas: Canvas, prompt: str) -> range:
    """What a forward computes that computes everything."""
    frozen = prompt == "frozen" and not canvas.new
    return range(canvas.prompt_length if frozen else 0, len(canvas))


def by_turns(first: Sequence[int], second: Sequence[int]) -> Iterator[int]:
    """One of each in turn, then what the longer one has left."""
    both = min(len(first), len(second))
    for pair in zip(first, second, strict=False):
        yield from pair
    yield from first[both:]
    yield from second[both:]
