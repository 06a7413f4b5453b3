"""The sampling of one request: from the logits of a node and the tokens before it to a token."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from linspec.decoding.sampling.params import SamplingParams
from linspec.decoding.sampling.rules import GrammarRules, make_rules
from linspec.decoding.sampling.warpers import keep_min_p, keep_top_k, keep_top_p
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError, InputError


class Sampler:
    """The sampling of one request: its history, its warped distributions, its random numbers.

    The generator is the request's own, so its output does not depend on which other requests run
    beside it. The history is the prompt and what `observe` was told; draft tokens that are not part
    of it yet are passed as `extra`.

    ends: tokens that end the output. plain: true when the argmax of the raw logits is the next token.
    unchanged: true when the distribution is that of the raw logits at the temperature of the request.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        vocab_size: int,
        eos_ids: Sequence[int] = (),
        grammars: GrammarRules | None = None,
    ) -> None:
        self.params = params
        self.vocab_size, self.eos_ids, self._grammars = vocab_size, tuple(eos_ids), grammars
        # its streams of neighbouring seeds are independent, as requests number theirs
        self._generator = np.random.default_rng(params.seed)
        prompt = tuple(prompt_ids)
        self._check_params()
        self._check_ids("the prompt or the output", prompt)
        self.ends = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)))
        self._rules = make_rules(params, prompt, vocab_size, sorted(self.ends), grammars)
        self._bans = list(dict.fromkeys(rule.bans for rule in self._rules if rule.bans))
        self.plain = params.greedy and not self._rules
        warped = params.top_k or params.top_p < 1 or params.min_p
        self.unchanged = self.plain or not (params.greedy or self._rules or warped)

    def restarted(self, prompt_ids: Iterable[int]) -> Sampler:
        """The same request at the start of another prompt."""
        return Sampler(self.params, prompt_ids, self.vocab_size, self.eos_ids, self._grammars)

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is taken and nothing is random."""
        return self.params.greedy

    def scores(self, logits: Tensor, extra: Sequence[int] = ()) -> Tensor:
        """Float32 logits [V] after the rules of the request, given the history and then `extra`.

        Raises InputError when they leave no token.
        """
        scores = logits.float()
        for rule in self._rules:
            scores = rule.apply(scores, extra)
        if self._bans and float(scores.max()) == -math.inf:
            raise InputError(
                f"nothing is allowed: {' and '.join(self._bans)} ban every token that could come next; "
                "leave at least one of them allowed"
            )
        return scores

    def probabilities(self, logits: Tensor, extra: Sequence[int] = ()) -> Tensor:
        """The distribution [V] that the next token is drawn from, float32.

        Scores, then temperature, top-k, top-p and min-p in this order, with the semantics of the warpers
        of transformers. At temperature 0 all mass is on the argmax.
        """
        scores = self.scores(logits, extra)
        if self.greedy:
            return torch.zeros_like(scores).index_fill(0, scores.argmax(), 1.0)
        # the likeliest score becomes 0, so that no temperature overflows it
        scores = (scores - scores.max()) / self.params.temperature
        scores = keep_top_k(scores, self.params.top_k)
        scores = keep_top_p(scores, self.params.top_p)
        scores = keep_min_p(scores, self.params.min_p)
        return scores.softmax(-1)

    def draw(self, probabilities: Tensor, number: float | None = None) -> int:
        """A token of the distribution [V], from one uniform; never one of probability 0.

        number: takes the place of the request's next one, and leaves that to come.
        """
        cumulative = probabilities.to("cpu", torch.float64).cumsum(0)
        total = float(cumulative[-1])
        if not 0 < total < math.inf:
            raise InputError(
                f"cannot draw a token from probabilities that sum to {total}: nothing is allowed, or "
                "the logits hold NaN, as damaged weights make them"
            )
        # the first token whose cumulative mass exceeds the point: a token of mass 0 never does
        point = (self.uniform() if number is None else number) * total
        return int(torch.searchsorted(cumulative, point, right=True))

    def uniform(self) -> float:
        """A float64 from [0, 1), the next number of this request."""
        return float(self._generator.random())

    def coming(self, count: int) -> list[float]:
        """What `uniform` will return the next `count` times.

        A draft that is drawn by the number which its position gets is likely what the target draws there.
        """
        return [float(number) for number in copy.deepcopy(self._generator).random(count)]

    def spend(self, count: int) -> None:
        """Let the next `count` numbers go, which somebody has used as `coming` told them."""
        self._generator.random(count)

    def ahead(self) -> Sampler:
        """The same request, for drafts: it draws the numbers that come next, and leaves them to come."""
        found = copy.copy(self)
        found._generator = copy.deepcopy(self._generator)
        return found

    def observe(self, tokens: Sequence[int]) -> None:
        """Add emitted tokens to the history."""
        self._check_ids("the prompt or the output", tokens)
        for rule in self._rules:
            rule.observe(tokens)

    def possible(self, tree: TokenTree) -> TokenTree:
        """The part of `tree` that the rules of the request leave possible, where they know it beforehand."""
        kept = tree
        for rule in self._rules:
            nodes = rule.possible(kept)
            kept = kept if len(nodes) == len(kept) else kept.part(nodes)
        return kept

    def forced(self) -> tuple[int, ...]:
        """The next tokens, as far as one of the rules leaves no choice about them."""
        return next(filter(None, (rule.forced() for rule in self._rules)), ())

    def _check_params(self) -> None:
        if self.params.n != 1:
            raise ConfigError(
                f"n = {self.params.n} sequences need a request each; use LLM, or params.sequences()"
            )
        self._check_ids("logit_bias", self.params.logit_bias)
        self._check_ids("allowed_token_ids", self.params.allowed_token_ids or ())
        self._check_ids("stop_token_ids", self.params.stop_token_ids)
        for word in self.params.bad_words:
            if not isinstance(word, str):
                self._check_ids("bad_words", word)

    def _check_ids(self, source: str, tokens: Iterable[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"{source} names token {token}, but the model has {self.vocab_size} tokens: "
                    f"ids go from 0 to {self.vocab_size - 1}"
                )
