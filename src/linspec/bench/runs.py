"""One way to decode on some prompts, timed, and how much faster it is than another."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from linspec.bench.oracle import Judged
from linspec.bench.prompts import BenchPrompt
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence, Stats
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.base import Drafter
from linspec.llm import LLM
from linspec.policies.base import Policy, RoundTimes

_RESAMPLES = 1000


class Watched(Policy):
    """Another policy, whose rounds are written down on the way.

    parts: seconds of drafting, of steps and of the rest since `take`. judged: the rounds since then.
    """

    name = "watched"

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.parts = (0.0, 0.0, 0.0)
        self.judged: list[Judged] = []
        self._accepted = 0

    def take(self) -> tuple[tuple[float, float, float], tuple[Judged, ...]]:
        """The seconds and the rounds so far, which then begin anew."""
        taken = self.parts, tuple(self.judged)
        self.parts, self.judged = (0.0, 0.0, 0.0), []
        return taken

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        return self.inner.plan(sequences, drafter)

    def keep(self, sequence: RunningSequence, tree: TokenTree) -> int:
        return self.inner.keep(sequence, tree)

    def observe(
        self, sequence: RunningSequence, drafted: int, accepted: int, expected: float
    ) -> None:
        self._accepted += accepted
        self.inner.observe(sequence, drafted, accepted, expected)

    def observe_round(self, times: RoundTimes) -> None:
        draft, step, rest = self.parts
        self.parts = (draft + times.draft, step + times.step, rest + times.rest)
        self.judged.append(
            Judged(self._accepted, times.drafts, times.draft, times.step, times.nodes)
        )
        self._accepted = 0
        self.inner.observe_round(times)

    def release(self, slot: int) -> None:
        self.inner.release(slot)


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to decode. watch: what adds up its round times, None for plain decoding."""

    name: str
    llm: LLM
    watch: Watched | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What one mode did with one group of prompts.

    seconds: of decoding, until the last answer of the group ended; whole: with reading the prompts. parts:
    seconds of drafting, verifying and the rest. judged: its rounds, where they were watched.
    """

    outputs: tuple[tuple[int, ...], ...]
    seconds: float
    whole: float
    rounds: int
    accepted: int
    tried: list[int]
    hits: list[int]
    parts: tuple[float, float, float]
    judged: tuple[Judged, ...] = ()

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.outputs))


@dataclass(frozen=True, slots=True)
class Measured:
    """One group of prompts of a family, and its run by every mode."""

    family: str
    runs: dict[str, Run]


def run_of(mode: Mode, group: Sequence[BenchPrompt], params: SamplingParams) -> Run:
    """Answer a group of prompts."""
    if mode.watch is not None:
        mode.watch.take()
    began = time.perf_counter()
    results = mode.llm.generate([list(text.ids) for text in group], params)
    whole = time.perf_counter() - began
    stats = [result.stats for result in results]
    parts, judged = mode.watch.take() if mode.watch is not None else ((0.0, 0.0, 0.0), ())
    return Run(
        outputs=tuple(result.token_ids for result in results),
        seconds=max(each.decode_seconds for each in stats),
        whole=whole,
        rounds=sum(each.rounds for each in stats),
        accepted=sum(each.accepted for each in stats),
        tried=_summed(stats, "tried"),
        hits=_summed(stats, "hits"),
        parts=parts,
        judged=judged,
    )


def _summed(stats: Sequence[Stats], name: str) -> list[int]:
    """Counts by depth, of all sequences."""
    counts: list[list[int]] = [getattr(each, name) for each in stats]
    depths = range(max(map(len, counts)))
    return [sum(each[d] for each in counts if d < len(each)) for d in depths]


def speed_up(
    runs: Sequence[Run], plain: Sequence[tuple[Run, Run]], *, whole: bool = False
) -> tuple[float, float, float]:
    """How many times as fast as plain decoding, and the ends of its 95% interval over the prompts.

    plain: its two runs on the same prompts, one before and one after. One group of prompts has no interval.
    """

    def ratio(indices: Sequence[int]) -> float:
        mine = [runs[i] for i in indices]
        both = [run for i in indices for run in plain[i]]
        return _seconds_per_token(both, whole) / _seconds_per_token(mine, whole)

    everything = range(len(runs))
    found = ratio(everything)
    if len(runs) == 1:
        return found, found, found
    rng = random.Random(0)
    drawn = [ratio(rng.choices(everything, k=len(runs))) for _ in range(_RESAMPLES)]
    ends = statistics.quantiles(drawn, n=40)
    return found, ends[0], ends[-1]


def _seconds_per_token(runs: Sequence[Run], whole: bool) -> float:
    seconds = sum(run.whole if whole else run.seconds for run in runs)
    return max(seconds, 1e-9) / max(1, sum(run.tokens for run in runs))
