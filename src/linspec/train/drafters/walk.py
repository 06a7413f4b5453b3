"""What a drafter brings when it is served, counted on held-out text: in rounds, as an engine would have them.

A round begins with a *root*, the target's choice behind the text so far. The drafter makes a chain behind it,
which is accepted as far as it is what the target chooses; the next round begins with the target's choice
behind the last accepted token. So rounds begin behind misses, which are harder than the rest of a text: an
average over all places promises more than is served.

A text is not always what the target chooses. What it would say elsewhere is not known: there a round ends
without a verdict on the drafts to come, and the next one begins with the next root in the text.

    walk = Walk(drafts=4, ranks=10)
    walk.add(ids, chosen, guesses)          # of each window
    walk.rates(), walk.prediction().tokens_per_round
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tokens of a round with a chain of so many drafts, the target's own token counted."""

    tokens_per_round: float
    drafts: int

    @classmethod
    def of(cls, rates: Sequence[float], drafts: int) -> Prediction:
        """From how often the draft of each depth is right where those before it were."""
        return cls(round(1 + sum(accumulate(rates, mul)), 4), drafts)

    def __str__(self) -> str:
        return f"predicts {self.tokens_per_round:.2f} tokens a round with {self.drafts} drafts"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, as drafter.json has them."""
        return asdict(self)


class Walk:
    """Counts drafts of the rounds of windows of text, by depth and rank."""

    def __init__(self, drafts: int, ranks: int) -> None:
        self.drafts, self.ranks = drafts, ranks
        self._hits = torch.zeros(drafts, ranks, dtype=torch.long)
        self._tried = torch.zeros(drafts, 1, dtype=torch.long)

    def add(self, ids: torch.Tensor, chosen: torch.Tensor, guesses: torch.Tensor) -> None:
        """Count the rounds of one window.

        ids [T] or more: its tokens. chosen [T]: the target's choice behind each place. guesses [N, drafts,
        ranks]: row i is drafted with the token of place i + 1 as its root, from its own likeliest tokens;
        where a depth has no place in the window, anything.
        """
        # behind which place the target chooses what each draft is compared with
        places = torch.arange(1, 1 + len(guesses), device=chosen.device)[:, None]
        places = places + torch.arange(self.drafts, device=chosen.device)
        tried, places = places < len(chosen), places.clamp(max=len(chosen) - 1)
        right, agreed = guesses == chosen[places][..., None], agreement(ids, chosen)
        tried[:, 1:] &= (right[:, :-1, 0] & agreed[places - 1][:, 1:]).cumprod(1).bool()
        rounds = round_starts((tried & right[..., 0]).sum(1), agreed)
        counted = tried[rounds]
        self._hits += (right[rounds] & counted[..., None]).sum(0).cpu()
        self._tried += counted.sum(0).cpu()[:, None]

    def rates(self) -> list[list[float]]:
        """By depth, the share of drafts whose rank-i guess was right; depths that nothing reached are cut."""
        found = (self._hits / self._tried.clamp(min=1)).tolist()
        reached = max(1, int((self._tried > 0).sum()))
        return [[round(rate, 5) for rate in row] for row in found[:reached]]

    def prediction(self) -> Prediction:
        """What a chain of all drafts brings."""
        return Prediction.of([row[0] for row in self.rates()], self.drafts)


def agreement(ids: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[T]: whether the token of place i + 1 of a text is what the target chose there."""
    following = ids[1 : len(chosen) + 1]
    agreed = torch.zeros_like(chosen, dtype=torch.bool)
    agreed[: len(following)] = following == chosen[: len(following)]
    return agreed


def round_starts(accepted: torch.Tensor, agreed: torch.Tensor) -> torch.Tensor:
    """The rows of the rounds of a text, ascending.

    accepted [N]: drafts that are known to be accepted where row i begins. agreed [N] or more: whether the
    root of row i is the target's choice.
    """
    lengths, roots = accepted.tolist(), agreed.tolist()
    at, found = 0, []
    while at < len(lengths):
        if roots[at]:
            found.append(at)
            at += lengths[at]
        at += 1
    return torch.tensor(found, dtype=torch.long, device=accepted.device)
