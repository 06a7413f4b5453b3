"""A tree that the step judges itself, on the device that computed its scores: what is asked, what comes of it.

Verifiers judge on the host and read the scores of one sequence after the other, each time waiting for the
device. Most requests need less: at each node one token of the target, its likeliest or one drawn, and the
child that carries it (Leviathan et al. 2023, arXiv 2211.17192). A step of static shape does that for all
sequences at once (`device_acceptance.py`), and the host reads a few whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from linspec.decoding.accepted import Accepted
from linspec.decoding.tree import Shape
from linspec.errors import NotFinite


def _none_coming(count: int) -> Sequence[float]:
    return ()


@dataclass(frozen=True, slots=True)
class JudgeBy:
    """How a step may judge a tree in the place of the verifier.

    Attributes:
        temperature: 0 for the likeliest token; otherwise scores are divided by it, and a token is drawn.
        coming: the next uniform numbers of the request, as many as asked: one is spent on each depth of the
            tree. Not asked at temperature 0.
    """

    temperature: float = 0.0
    coming: Callable[[int], Sequence[float]] = _none_coming

    def numbers(self, shape: Shape) -> Sequence[float]:
        """A number for each depth of a tree."""
        return self.coming(shape.deepest + 1) if self.temperature > 0 else ()


BY_ARGMAX = JudgeBy()


@dataclass(frozen=True, slots=True)
class Judged:
    """What a step made of a tree. Of its nodes only those of the path are staged now, as a chain.

    Attributes:
        path, token: as in `Accepted`.
        finite: whether its scores were numbers; nothing else holds where they were not.
        hidden: by layer, states [P, D] of the nodes of the path.
        follow: what `Want.follow` computed behind the path; () where nothing was wanted.
    """

    path: tuple[int, ...]
    token: int
    finite: bool
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    follow: tuple[int, ...] = ()

    def accepted(self) -> Accepted:
        """As a verifier would say it; raises NotFinite where scores were NaN or infinite."""
        if not self.finite:
            raise NotFinite("the scores of the next token")
        return Accepted(self.path, self.token, None)
