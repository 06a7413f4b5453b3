"""A tree that the step judges itself, on the device that computed its scores: the question and the answer.

Verifiers judge on the host and read the scores of one sequence after the other, each time waiting for the
device. Most requests need less: at each node one token of the target, its likeliest or one drawn, and the
child that carries it (Leviathan et al. 2023, arXiv 2211.17192). A step of static shape does that for all
sequences at once (`device_acceptance.py`), and the host reads a few whole numbers. A device may also run
ahead of the host: the next tree is made of what the last round decided, and is judged in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from linspec.decoding.accepted import Accepted
from linspec.errors import NotFinite

# from the FINAL states [R, D] of nodes and the tokens [R] behind them: whole numbers [R, G]
Follow = Callable[[Tensor, Tensor], Tensor]


def _none_coming(count: int) -> Sequence[float]:
    return ()


@dataclass(frozen=True, slots=True)
class JudgeBy:
    """How a step may judge a tree in the place of the verifier.

    Attributes:
        temperature: 0 for the likeliest token; otherwise scores are divided by it, and a token is drawn.
        coming: the next uniform numbers of the request, as many as asked: one is spent on each token. Not
            asked at temperature 0.
        regrow: see `TokenTree.regrow`.
    """

    temperature: float = 0.0
    coming: Callable[[int], Sequence[float]] = _none_coming
    regrow: tuple[int, ...] = ()

    def numbers(self, count: int) -> Sequence[float]:
        """The next `count` numbers, as far as any are needed."""
        return self.coming(count) if self.temperature > 0 else ()


BY_ARGMAX = JudgeBy()


@dataclass(frozen=True, slots=True)
class Onward:
    """What a step does behind the trees that it judges.

    Attributes:
        follow: computed for each accepted path by its last node, see `Judged.follow`. It decides nothing by
            what is in its tensors, so that it can be recorded.
        rounds: most rounds in a row, each with the trees that the one before it brings (`JudgeBy.regrow`).
            Only where all inputs are judged.
    """

    follow: Follow | None = None
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class Judged:
    """What a step made of a tree. Of its nodes only those of the path are staged now, as a chain.

    Attributes:
        path, token: as in `Accepted`.
        finite: whether its scores were numbers; nothing else holds where they were not.
        hidden: by layer, states [P, D] of the nodes of the path.
        follow: what `Onward.follow` computed behind the path; () where nothing was wanted.
        next: what became of the tree of the next round, where the device went on; None where it did not. The
            nodes of its path are then staged behind those of this one. It waits for that round alone.
    """

    path: tuple[int, ...]
    token: int
    finite: bool
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    follow: tuple[int, ...] = ()
    next: Callable[[], Judged] | None = field(default=None, compare=False)

    def accepted(self) -> Accepted:
        """As a verifier would say it; raises NotFinite where scores were NaN or infinite."""
        if not self.finite:
            raise NotFinite("the scores of the next token")
        return Accepted(self.path, self.token, None)
