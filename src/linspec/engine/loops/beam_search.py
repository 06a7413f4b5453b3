"""The search of beam search, without a model: scores in, hypotheses out.

It is that of transformers, number for number (`GenerationMixin._beam_search`): float32 sums of
log-probabilities, candidates beyond the width as a reserve for those that end, and its rules for stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from linspec.decoding.accepted import TokenLogprob
from linspec.utils.options import option

STOPPING = ("true", "false", "never")


@dataclass(frozen=True, slots=True)
class BeamOptions:
    """What is searched for, and for how long."""

    width: int = option("hypotheses that are kept, num_beams of transformers", default=4)
    length_penalty: float = option(
        "scores are divided by the length to this power; above 0 favours long outputs", default=1.0
    )
    early_stopping: str = option(
        "true: stop when WIDTH hypotheses have ended; false: when none looks better at its length; "
        "never: when none can become better",
        default="false",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 64:
            raise ValueError("width must be from 1 (greedy decoding) to 64")
        if self.early_stopping not in STOPPING:
            raise ValueError(f"early_stopping must be one of {', '.join(STOPPING)}")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Output tokens, the slot that holds those before them, and the model's own log-probabilities."""

    tokens: tuple[int, ...]
    slot: int
    logprobs: tuple[TokenLogprob, ...] = ()


# (number of the live hypothesis, token) -> what follows it
Extend = Callable[[int, int], Hypothesis]


class BeamSearch:
    """live: hypotheses that go on, the best first. ended: the best that have ended, with their scores."""

    def __init__(
        self, options: BeamOptions, longest: int, ends: Collection[int], first: Hypothesis
    ) -> None:
        self.options, self.longest, self.ends = options, longest, ends
        self.live = [first]
        self.ended: list[tuple[float, Hypothesis]] = []
        self.done = False
        self._sums = torch.zeros(1)
        self._length = 0

    @property
    def best(self) -> Hypothesis:
        """The hypothesis that has won, once the search is done."""
        return self.ended[0][1]

    def advance(self, scores: Tensor, extend: Extend) -> None:
        """Go on by one token, whose scores [live, V] are log-probabilities with the rules of the request."""
        width, vocab = self.options.width, scores.shape[1]
        sums = (self._sums[:, None] + scores.float().cpu()).flatten()
        reserve = max(2, 1 + len(self.ends)) * width
        best = sums.topk(min(reserve, len(sums)))
        self._length += 1
        live: list[tuple[float, Hypothesis]] = []
        for rank, (score, place) in enumerate(
            zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            if score == -torch.inf:
                break
            token = place % vocab
            if token in self.ends or self._length >= self.longest:
                # those beyond the width are a reserve of what goes on
                if rank < width:
                    self._end(best.values[rank], extend(place // vocab, token))
            elif len(live) < width:
                live.append((score, extend(place // vocab, token)))
        self.live = [hypothesis for _, hypothesis in live]
        self._sums = torch.tensor([score for score, _ in live])
        self.done = self._is_done()

    def _end(self, score: Tensor, hypothesis: Hypothesis) -> None:
        normalized = float(score / self._length**self.options.length_penalty)
        self.ended.append((normalized, hypothesis))
        # stable: of equal scores the older one stays in front
        self.ended.sort(key=lambda each: -each[0])
        del self.ended[self.options.width :]

    def _is_done(self) -> bool:
        if not self.live:
            return True
        if len(self.ended) < self.options.width:
            return False
        if self.options.early_stopping == "true":
            return True
        penalty = self.options.length_penalty
        never = self.options.early_stopping == "never" and penalty > 0
        length = self.longest if never else self._length
        return float(self._sums[0] / length**penalty) <= self.ended[-1][0]
