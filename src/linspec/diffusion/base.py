"""The five kinds of policies of masked diffusion, each a registry; they are made like a Drafter.

A policy keeps nothing of a sequence: whatever it needs is in the canvas, so sequences of a batch and repeated
rounds change nothing for each other.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from linspec.decoding.step import Watch
from linspec.decoding.target import Target
from linspec.diffusion.candidates import Candidates
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.predictions import Predictions
from linspec.utils.registry import Registry

T = TypeVar("T")
_AND = re.compile(r"\+(?=[A-Za-z_][\w-]*=)")


class DiffusionPolicy(ABC):
    """What all kinds have.

    Attributes:
        name: under which it is registered.
    """

    name: ClassVar[str]

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def attached(self, target: Target) -> None:
        """The model that is decoded, with its tokenizer; told once, before any sequence starts."""


class BlockPolicy(DiffusionPolicy):
    """How long the next block is."""

    @abstractmethod
    def length(self, canvas: Canvas, predictions: Predictions) -> int:
        """Positions of the block at `canvas.start`, 1 or more; asked once, after its first forward.

        The canvas may have fewer left; then the block ends with it.
        """

    @property
    def window(self) -> int | None:
        """Most masks that are open at once, the first ones of the block; None for all of them.

        With a window text goes out as far as it is decided, before the block is full.
        """
        return None


class CommitPolicy(DiffusionPolicy):
    """Which tokens of a block are decided in a round.

    Attributes:
        whole: whether it reads what a forward says of decided positions of the block too.
        edits: whether it replaces decided tokens of the block. A full block then goes out when a forward has
            changed nothing, or when nothing may change any more.
    """

    whole: bool = False
    edits: bool = False

    @abstractmethod
    def commit(self, candidates: Candidates) -> Tensor:
        """[M] booleans, true for at least one candidate."""

    @property
    def knows_ahead(self) -> bool:
        """Whether it can say before a forward what that will decide."""
        return False

    def ahead(self, canvas: Canvas) -> Sequence[int]:
        """The open positions that the next forward decides, if that is known now; else none.

        Where a cache policy goes by them, the forward may say nothing of other positions.
        """
        return ()

    def edit(self, decided: Candidates) -> Tensor:
        """[M] booleans, true for what is to be replaced by the token that this forward proposes.

        decided: tokens that stand in the block and may change. Asked in every forward if the policy `edits`.
        """
        return torch.zeros_like(decided.positions).bool()


class StopPolicy(DiffusionPolicy):
    """When there is no need to go on as planned."""

    @property
    def foresees(self) -> bool:
        """Whether it reads what forwards say: those of all masks then, else those of the block alone."""
        mine = type(self)
        return mine.fills is not StopPolicy.fills or mine.cuts is not StopPolicy.cuts

    def fills(self, canvas: Canvas, predictions: Predictions) -> bool:
        """Whether everything undecided is decided now; asked after every forward."""
        return False

    def cuts(self, canvas: Canvas, predictions: Predictions, ends: frozenset[int]) -> int:
        """How many positions of the canvas are kept; asked after every forward, once it has decided.

        Masks that were cut come back behind a canvas that is full without an end.
        """
        return len(canvas)

    def ends(self, block: Sequence[int], ends: frozenset[int]) -> bool:
        """Whether nothing behind a full block is computed; asked once one of `ends` ended the text."""
        return False


class CountedWatch(Watch, Protocol):
    """A watch that counts."""

    @property
    def computed(self) -> int:
        """Positions × layers that the forward computed."""
        ...


class CachePolicy(DiffusionPolicy):
    """Which positions a forward computes; the others keep the keys and values that they have.

    Attributes:
        goes_ahead: whether it computes what `canvas.ahead` names, not all that is open. The commit policy
            must know this.
    """

    goes_ahead: ClassVar[bool] = False

    @abstractmethod
    def rows(self, canvas: Canvas) -> Sequence[int]:
        """Different positions of the canvas; the loop adds those that it reads logits from.

        Of a canvas that is `new` nothing is kept: all of its positions have to be computed.
        """

    def watch(self, canvas: Canvas, rows: Sequence[int]) -> CountedWatch | None:
        """What looks at the forward of these rows between its layers; most policies have no such thing.

        What it keeps for the next forward belongs into `canvas.kept`.
        """
        return None


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step: sequences in it, positions that it computed of all canvases and drafts, and its seconds.

    seconds: with those in which its drafts were made.
    """

    sequences: int
    positions: int
    seconds: float


class VerifyPolicy(DiffusionPolicy):
    """Which coming canvases a forward computes along, and which of them the text goes on with.

    Attributes:
        drafts: whether it ever has any computed.
        price: plain forwards that one with a draft costs, as far as it knows.
    """

    drafts: ClassVar[bool] = True
    price: float | None = None

    @property
    def observes(self) -> bool:
        """Whether it wants to know what the next step costs; asked in every round."""
        return False

    @property
    def most_drafts(self) -> int:
        """The largest number that `ahead` answers: so many copies of a state are counted as its memory."""
        return 0

    def ahead(self, canvas: Canvas) -> int:
        """How many drafts are computed along with a canvas, at most; 0 for none.

        Draft n is what the canvas will be after n more rounds if the next forwards say what the last one
        said; drafts end with the block.
        """
        return 0

    def tries(self, sures: Sequence[float], rows: int) -> bool:
        """Whether a draft is computed along, and those behind it may be.

        sures: of the draft and those before it, how likely the last forward found all tokens that they have
        and the canvas lacks; asked first with a bound on that of the first. The surer, the sooner the answer
        is yes. rows: positions of each canvas that the next forward computes.
        """
        return True

    def judged(self, sures: Sequence[float], followed: int) -> None:
        """Learn from a forward with drafts, that found them so likely: how many of them came true."""

    def observe(self, cost: StepCost) -> None:
        """Learn what a step cost, if it `observes`; those that begin a block are not reported."""

    def follows(self, canvas: Canvas, drafts: Sequence[Canvas]) -> int:
        """Which draft the text goes on with, counted from 1; 0 for none of them.

        canvas: what the forward made of the canvas before the first draft. What the forward said of the
        draft is then asked, as if it were the next forward.
        """
        return 0


def _registry(axis: str, base: type[Any]) -> Registry[Any]:
    return Registry(f"diffusion {axis} policy", f"linspec.diffusion_{axis}s", base=base)


BLOCKS: Registry[BlockPolicy] = _registry("block", BlockPolicy)
COMMITS: Registry[CommitPolicy] = _registry("commit", CommitPolicy)
STOPS: Registry[StopPolicy] = _registry("stop", StopPolicy)
CACHES: Registry[CachePolicy] = _registry("cache", CachePolicy)
VERIFIES: Registry[VerifyPolicy] = Registry(
    "diffusion verify policy", "linspec.diffusion_verifies", base=VerifyPolicy
)


def build(registry: Registry[T], spec: str) -> T:
    """The policy of NAME, NAME:VALUE or NAME:key=value+key=value.

    It stands inside the spec of a loop, where a comma ends it, so a plus takes the place of the comma.
    """
    return registry.build(_AND.sub(",", spec))
