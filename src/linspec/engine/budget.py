"""How many prompt tokens ride in a step, and whose they are (Sarathi-Serve, arXiv 2403.02310).

Sequences that decode come first, with their trees; prompts get what is left. Without a target the rest is a
number of tokens. With one it is what the step-time curve of this model on this machine leaves of the target:
a few sizes are measured (`policies/costs.py`), the others are learned from the steps as they run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log2

from linspec.decoding.sequence import RunningSequence
from linspec.utils.sizes import check_positive, check_size

# Pieces of a prompt end at multiples of it. Grouped mixers add up the tokens of a piece in another order
# when it begins elsewhere, and quantized layers make a visible difference of that: a prompt would
# read otherwise beside other requests.
PIECE = 64
# where the target leaves less than a piece: the fewest tokens that are still added up in the same order
LEAST = 16
# sizes that the curve has
_MEASURED = (LEAST, 2 * LEAST, PIECE)
# share of the target that is planned for: the rest is for what no curve knows
_AIM = 0.9
# what prompts get in any case, as a share of the seconds of decoding: beyond what the machine can do the
# target is out of reach, and those that came last must not pay for it alone
_FLOOR = 0.25
# how fast new seconds are believed, and how many times what was known they count at most: other programs
# take the cores now and then, which says nothing about the next step
_RATE, _SPIKE = 0.25, 2.0
# how fast a size that is too dear to be tried is forgotten, where smaller ones say that it may be cheaper
_FADE = 0.02


class StepTimes:
    """Seconds of a step: what those that decode need, and what prompt tokens add to it.

    curve: seconds of a step by its nodes, up to `PIECE` of them.
    """

    def __init__(self, curve: Callable[[float], float]) -> None:
        self._curve = curve
        # what a step without prompt tokens takes beside the curve's seconds: drafts, trees, Python
        self._rest = 0.0
        # seconds that so many prompt tokens were seen to add; sizes double
        self._seen: dict[int, float] = {}
        # how many times as much as the curve says the sizes that it has were seen to add
        self._off = 1.0

    def decoding(self, sequences: int) -> float:
        """Seconds of a step in which so many sequences decode."""
        curve = self._curve(sequences)
        return max(curve + self._rest, 0.1 * curve) if sequences else 0.0

    def reading(self, tokens: int) -> float:
        """Seconds that so many prompt tokens add: straight lines between the sizes that are known."""
        points = self._points()
        for (few, low), (many, high) in pairwise(points):
            if tokens <= many:
                return low + max(0.0, high - low) * (tokens - few) / (many - few)
        size, seconds = points[-1]
        return self._scaled(seconds, size, tokens)

    def _points(self) -> list[tuple[int, float]]:
        guessed = {size: self._off * self._by_curve(size) for size in _MEASURED}
        return [(0, 0.0), *sorted((guessed | self._seen).items())]

    def _by_curve(self, tokens: int) -> float:
        return max(self._curve(tokens) - self._curve(1), 1e-9)

    def _scaled(self, added: float, tokens: int, size: int) -> float:
        """What `size` tokens add at most where `tokens` add so much.

        More tokens need at most as much more of the whole step: what reads the weights is paid for once.
        """
        rest = self.decoding(1) if size > tokens else 0.0
        return (rest + added) * size / tokens - rest

    def observe(self, sequences: int, tokens: int, seconds: float) -> None:
        """Learn from a step in which `sequences` decoded and `tokens` prompt tokens were read."""
        if not tokens:
            self._rest = _blend(self.decoding(sequences), seconds) - self._curve(sequences)
            return
        # alone, prompt tokens pay for reading the weights too
        added = max(seconds - self.decoding(max(1, sequences)), 0.0)
        size = LEAST * 2 ** max(0, round(log2(tokens / LEAST)))
        seen = self._scaled(added, tokens, size)
        if size in _MEASURED:
            self._off = _blend(self._off, seen / self._by_curve(size))
        if size in self._seen:
            self._seen[size] = _blend(self._seen[size], seen)
        else:
            # only that it is no hiccup is known of this size
            self._seen[size] = min(seen, _SPIKE * (self.reading(size) + self.decoding(1)))
        self._fade(size)

    def _fade(self, size: int) -> None:
        """Larger sizes than the one that was seen: at most what it says of them, little by little."""
        for larger in [each for each in self._seen if each > size]:
            most = self._scaled(self._seen[size], size, larger)
            self._seen[larger] -= _FADE * max(0.0, self._seen[larger] - most)


def _blend(known: float, seen: float) -> float:
    seen = min(seen, _SPIKE * known or seen)
    return known + _RATE * (seen - known)


class TokenBudget:
    """Shares out the prompt tokens of each step.

    prefill_tokens: most of a step. tbt_ms: milliseconds between two tokens of those that decode, which the
    steps beside a prompt should stay within, as far as `times` are known; where decoding leaves less of them
    than `_FLOOR` of its own seconds, prompts get that. None: `prefill_tokens` in every step.
    """

    def __init__(
        self, prefill_tokens: int, tbt_ms: float | None = None, times: StepTimes | None = None
    ) -> None:
        check_size("prefill_tokens", prefill_tokens)
        if tbt_ms is not None:
            check_positive("tbt_ms", tbt_ms)
        self.prefill_tokens, self.tbt_ms, self.times = prefill_tokens, tbt_ms, times
        # seconds that steps had left for prompts, too few to read anything
        self._saved = 0.0
        # the step in which each prompt came, or the one behind its last turn
        self._step = 0
        self._turns: dict[RunningSequence, int] = {}

    def shares(
        self, prompts: Sequence[RunningSequence], decoding: int
    ) -> list[tuple[RunningSequence, int]]:
        """The prompts that the next step reads from, the first come first, with their numbers of tokens.

        A prompt gets at most half while others wait, unless they leave it more. Who has waited longest for a
        turn comes first. decoding: sequences that decode in that step.
        """
        self._step += 1
        self._turns = {each: self._turns.get(each, self._step) for each in prompts}
        tokens = self._tokens(decoding) if prompts else 0
        unit = min(PIECE if tokens >= PIECE else LEAST, self.prefill_tokens)
        cap = max(unit, tokens // 2) if len(prompts) > 1 else tokens
        order = sorted(prompts, key=self._turns.__getitem__)
        counts, left = dict.fromkeys(order, 0), tokens
        for most in (cap, tokens):
            for each in order:
                more = _up_to(each, min(most, counts[each] + left), unit) - counts[each]
                counts[each], left = counts[each] + more, left - more
        shares = [(each, counts[each]) for each in prompts if counts[each]]
        self._turns |= {each: self._step + 1 for each, _ in shares}
        return shares

    def _tokens(self, decoding: int) -> int:
        """Prompt tokens of the next step; all that a step may have where nobody waits for its next token."""
        if self.times is None or self.tbt_ms is None or not decoding:
            self._saved = 0.0
            return self.prefill_tokens
        seconds = self.times.decoding(decoding)
        room = max(_AIM * self.tbt_ms / 1e3 - seconds, _FLOOR * seconds)
        found = self._largest(PIECE, room) or self._largest(LEAST, room)
        self._saved = 0.0 if found else self._saved + room
        least = min(LEAST, self.prefill_tokens)
        if not found and self.times.reading(least) <= self._saved:
            found, self._saved = least, 0.0
        return found

    def _largest(self, unit: int, room: float) -> int:
        """The largest multiple of `unit` that adds at most `room` seconds; 0 if none does."""
        assert self.times is not None
        unit = min(unit, self.prefill_tokens)
        sizes = range(unit, self.prefill_tokens + 1, unit)
        fitting = bisect_right(sizes, room, key=self.times.reading)
        return sizes[fitting - 1] if fitting else 0


def _up_to(sequence: RunningSequence, most: int, unit: int) -> int:
    """At most `most` further tokens of a prompt: all of them, or as many as end at a multiple of `unit`."""
    begin = sequence.prefilled
    if sequence.unread <= most:
        return sequence.unread
    return max(0, (begin + most) // unit * unit - begin)
