"""How one request turns logits into tokens: its settings and its own random numbers.

sampler = Sampler(SamplingParams(temperature=0.8, seed=1), prompt_ids, vocab_size)
token = sampler.draw(sampler.probabilities(logits))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linspec.config import check_size
from linspec.errors import ConfigError, InputError
from linspec.messages import shown

# below this, scores divided by the temperature leave float32
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks of generation; raises ConfigError for a setting that breaks a rule.

    max_tokens: most tokens to emit.
    temperature: 0 takes the likeliest token; otherwise the scores are divided by it.
    top_k, top_p: keep the k likeliest tokens, then the fewest tokens whose mass reaches p.
        0 and 1.0 keep all.
    repetition_penalty: above 1 makes tokens of the prompt and the output less likely.
    logit_bias: added to the scores of single token ids; -inf bans a token.
    stop: texts that end the output; one string is one text.
    seed: equal seeds give equal outputs; None takes fresh entropy.
    logprobs: None reports none, k reports each token's and those of the k likeliest.
    ignore_eos: go on after the end-of-sequence token.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop: str | tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(f"logit_bias must be a mapping, got {shown(repr(self.logit_bias))}")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        given: Any = self.stop
        if not isinstance(given, Iterable) or isinstance(given, bytes):
            raise ConfigError(f"stop must hold texts, got {shown(repr(given))}")
        stop = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "stop", stop)
        self._check_lengths()
        self._check_warpers()

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is taken and nothing is random."""
        return self.temperature == 0

    def _check_lengths(self) -> None:
        check_size("max_tokens", self.max_tokens)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(
                f"stop must hold non-empty strings, got {self.stop!r}; use () to stop at none"
            )
        if self.logprobs is not None:
            check_size("logprobs", self.logprobs, least=0)
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**64):
            raise ConfigError(
                f"seed must be a whole number from 0 to 2**64 - 1, got {shown(self.seed)}; use None for "
                "fresh entropy"
            )

    def _check_warpers(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), int | float):
                raise ConfigError(
                    f"{name} must be a number, got {shown(repr(getattr(self, name)))}"
                )
        # "not >=" instead of "<": NaN must fail too
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature must be 0 (greedy) or finite and at least {MIN_TEMPERATURE}, "
                f"got {self.temperature}"
            )
        # 0 keeps all
        check_size("top_k", self.top_k, least=0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p must be above 0 and at most 1 (keep all), got {self.top_p}; "
                "use temperature=0 for the likeliest token"
            )
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty must be finite and above 0, got {self.repetition_penalty}; "
                "use 1.0 for none"
            )
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or not isinstance(bias, int | float):
                raise ConfigError(
                    f"logit_bias maps token ids to numbers, got {shown(repr(token))}: {shown(repr(bias))}"
                )
            if math.isnan(bias) or bias == math.inf:
                raise ConfigError(
                    f"logit_bias of token {token} must be a finite number or -inf, got {bias}"
                )


class Sampler:
    """The sampling of one request: its history, its warped distributions, its random numbers.

    The generator is the request's own, so its output does not depend on which other requests run
    beside it. The history is the prompt and what `observe` was told; draft tokens that are not part
    of it yet are passed as `extra`.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], vocab_size: int) -> None:
        self.params = params
        self.vocab_size = vocab_size
        # its streams of neighbouring seeds are independent, as requests number theirs
        self._generator = np.random.default_rng(params.seed)
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._check_ids("logit_bias", params.logit_bias)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self.observe(tuple(prompt_ids))

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is taken and nothing is random."""
        return self.params.greedy

    @property
    def plain(self) -> bool:
        """True when the argmax of the raw logits is the next token."""
        return self.greedy and self.params.repetition_penalty == 1 and not self.params.logit_bias

    def scores(self, logits: Tensor, extra: Sequence[int] = ()) -> Tensor:
        """Float32 logits [V] after the repetition penalty (Keskar et al. 2019) and the bias.

        Raises InputError when the bias leaves no token.
        """
        scores = logits.float()
        if self.params.repetition_penalty != 1:
            scores = self._penalized(scores, extra)
        if self.params.logit_bias:
            ids, bias = self._bias_ids.to(scores.device), self._bias.to(scores.device)
            scores = scores.index_add(0, ids, bias)
            if float(scores.max()) == -math.inf:
                raise InputError(
                    "nothing is allowed: the logit bias bans every token that could come next; leave at "
                    "least one of them without a bias of -inf"
                )
        return scores

    def probabilities(self, logits: Tensor, extra: Sequence[int] = ()) -> Tensor:
        """The distribution [V] that the next token is drawn from, float32.

        Scores, then temperature, top-k and top-p in this order, with the semantics of the warpers of
        transformers. At temperature 0 all mass is on the argmax.
        """
        scores = self.scores(logits, extra)
        if self.greedy:
            return torch.zeros_like(scores).index_fill(0, scores.argmax(), 1.0)
        # the likeliest score becomes 0, so that no temperature overflows it
        scores = (scores - scores.max()) / self.params.temperature
        scores = keep_top_k(scores, self.params.top_k)
        scores = keep_top_p(scores, self.params.top_p)
        return scores.softmax(-1)

    def draw(self, probabilities: Tensor) -> int:
        """A token of the distribution [V], from one uniform; never one of probability 0."""
        cumulative = probabilities.to("cpu", torch.float64).cumsum(0)
        total = float(cumulative[-1])
        if not 0 < total < math.inf:
            raise InputError(
                f"cannot draw a token from probabilities that sum to {total}: nothing is allowed, or "
                "the logits hold NaN, as damaged weights make them"
            )
        # the first token whose cumulative mass exceeds the point: a token of mass 0 never does
        point = self.uniform() * total
        return int(torch.searchsorted(cumulative, point, right=True))

    def uniform(self) -> float:
        """A float64 from [0, 1), the next number of this request."""
        return float(self._generator.random())

    def observe(self, tokens: Sequence[int]) -> None:
        """Add emitted tokens to the history."""
        self._check_ids("the prompt or the output", tokens)
        # an indexed write costs as much as a tenth of a small model's step
        if tokens and self.params.repetition_penalty != 1:
            self._seen[list(tokens)] = True

    def _penalized(self, scores: Tensor, extra: Sequence[int]) -> Tensor:
        seen = self._seen
        if extra:
            seen = seen.clone()
            seen[list(extra)] = True
        penalty = self.params.repetition_penalty
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(seen.to(scores.device), penalized, scores)

    def _check_ids(self, source: str, tokens: Iterable[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"{source} names token {token}, but the model has {self.vocab_size} tokens: "
                    f"ids go from 0 to {self.vocab_size - 1}"
                )


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Scores [V] with -inf below the k-th largest; ties with it stay. 0 keeps all."""
    if k == 0 or k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[-1], -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Scores [V] with -inf outside the fewest tokens whose mass reaches p (at least one stays)."""
    if p == 1:
        return scores
    rising, order = scores.sort(stable=True)
    dropped = rising.softmax(-1).cumsum(-1) <= 1 - p
    dropped[-1] = False
    return scores.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), -math.inf)
