"""What a policy could have got at most: the best tree for each round by one who knows what is accepted.

times = oracle([Judged(accepted=2, drafts=4, draft=0.001, step=0.004, nodes=5)], curve)

In each recorded round it could have verified some of the drafts that were accepted, and nothing else, or
none: a plain step. Steps cost what the curve of this machine says, and drafts what they took, less for fewer.
Rounds are taken for themselves, and what was never drafted is not known: with a policy of n drafts in every
round it is a bound for the policies that choose among up to n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Judged:
    """A round of one sequence: draft and step are seconds."""

    accepted: int
    drafts: int
    draft: float
    step: float
    nodes: int


def oracle(rounds: Sequence[Judged], curve: Callable[[float], float]) -> float:
    """Tokens per second, in those of plain decoding.

    The choice with the most tokens per second is found by Dinkelbach's iteration (1967): choose in each round
    what is worth most at the rate so far, until that raises the rate no more.
    """
    choices = _choices(rounds, curve)
    rate = 1.0
    while choices:
        chosen = [max(each, key=lambda one: one[0] - rate * one[1]) for each in choices]
        better = sum(tokens for tokens, _ in chosen) / sum(cost for _, cost in chosen)
        if better <= rate * (1 + 1e-9):
            break
        rate = better
    return rate


def _choices(
    rounds: Sequence[Judged], curve: Callable[[float], float]
) -> list[list[tuple[int, float]]]:
    """For each round, tokens and cost in plain steps of all that it could have verified."""
    known = sum(curve(each.nodes) for each in rounds)
    # the machine may be slower than it was when the curve was measured
    slow = sum(each.step for each in rounds) / known if known else 1.0
    plain = curve(1)

    def cost(each: Judged, taken: int) -> float:
        drafting = each.draft / slow * taken / each.drafts if taken else 0.0
        return (curve(1 + taken) + drafting) / plain

    return [
        [(1 + taken, cost(each, taken)) for taken in range(each.accepted + 1)] for each in rounds
    ]
