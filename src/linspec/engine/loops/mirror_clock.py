"""A virtual clock of two devices: what rounds would take if drafter and target ran beside each other.

costs = Costs(target=40.0, exit=0.5, draft=12.0, rollout=18.0)
synchronous(verdicts, costs) / overlapped(verdicts, costs)      # the speed-up over plain speculation
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round decided: accepted drafts, and whether the window behind its new token was ready."""

    accepted: int
    ready: bool


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of the parts of a round, as they were measured.

    Attributes:
        target: a step of the target over a window.
        exit: share of that step until the guesses are known.
        draft: drafting one window, on the drafter's device.
        rollout: drafting the windows behind all guesses, there.
        message: telling the other device something; a round has two messages.
    """

    target: float
    exit: float
    draft: float
    rollout: float
    message: float = 0.0


def hit_rate(verdicts: Iterable[Verdict]) -> float:
    """The share of rounds whose next window was ready; 0 without rounds."""
    found = [verdict.ready for verdict in verdicts]
    return sum(found) / len(found) if found else 0.0


def synchronous(verdicts: Iterable[Verdict], costs: Costs) -> float:
    """Seconds of plain speculation: every window is drafted, then verified."""
    return sum(costs.draft + costs.target + 2 * costs.message for _ in verdicts)


def overlapped(verdicts: Iterable[Verdict], costs: Costs) -> float:
    """Seconds with rollouts beside the upper layers; a window that was not ready is drafted first."""
    lower, upper = costs.exit * costs.target, (1 - costs.exit) * costs.target
    seconds, ready = 0.0, False
    for verdict in verdicts:
        seconds += 0.0 if ready else costs.draft
        seconds += lower + max(upper, costs.rollout) + 2 * costs.message
        ready = verdict.ready
    return seconds
