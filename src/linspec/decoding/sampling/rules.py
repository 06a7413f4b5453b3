"""What the tokens so far do to the scores of the next one: penalties, bias, bans, processors.

    rules = make_rules(params, prompt, vocab_size, ends)
    for rule in rules:
        scores = rule.apply(scores, drafts)

A rule knows the prompt and what was emitted. The tokens on the path to a node of a draft tree are no
part of that yet: they come as `drafts`. So a node's scores are those that plain decoding would have there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from linspec.decoding.sampling.grammar import Grammar
from linspec.decoding.sampling.params import SamplingParams
from linspec.decoding.tree import TokenTree
from linspec.errors import ConfigError, InputError, WrongType
from linspec.utils.messages import shown


class Rule(ABC):
    """Changes the scores of a node by the tokens before it; leaves what it is given as it was.

    bans: the setting that takes tokens away with it, '' for none.
    """

    bans = ""

    @abstractmethod
    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        """Scores [V] behind the tokens observed so far and the `drafts`."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Add emitted tokens."""

    def possible(self, tree: TokenTree) -> Sequence[int]:
        """The nodes of `tree`, in their order, whose drafts may come; where unsure, all of them."""
        return range(len(tree))

    def forced(self) -> tuple[int, ...]:
        """The next tokens, as far as this rule leaves no choice about them."""
        return ()


class RepetitionPenalty(Rule):
    """Tokens that occurred, in the prompt too, become less likely by a factor (Keskar et al. 2019)."""

    def __init__(self, penalty: float, prompt: Sequence[int], vocab_size: int) -> None:
        self.penalty = penalty
        self.seen = torch.zeros(vocab_size, dtype=torch.bool)
        self.observe(prompt)

    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        seen = self.seen
        if drafts:
            seen = seen.clone()
            seen[list(drafts)] = True
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen.to(scores.device), penalized, scores)

    def observe(self, tokens: Sequence[int]) -> None:
        if tokens:
            self.seen[list(tokens)] = True


class CountPenalty(Rule):
    """Tokens of the output lose `presence`, and `frequency` for each time that they occurred."""

    def __init__(self, presence: float, frequency: float, vocab_size: int) -> None:
        self.presence, self.frequency = presence, frequency
        self.counts = torch.zeros(vocab_size)

    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        counts = _counted(self.counts.clone(), drafts) if drafts else self.counts
        counts = counts.to(scores.device)
        return scores - self.frequency * counts - self.presence * (counts > 0)

    def observe(self, tokens: Sequence[int]) -> None:
        _counted(self.counts, tokens)


def _counted(counts: Tensor, tokens: Sequence[int]) -> Tensor:
    return counts.index_add_(0, torch.tensor(tokens, dtype=torch.long), torch.ones(len(tokens)))


class Bias(Rule):
    """Numbers added to the scores of single tokens."""

    bans = "logit_bias"

    def __init__(self, bias: dict[int, float]) -> None:
        self.ids = torch.tensor(list(bias), dtype=torch.long)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32)

    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        ids, bias = self.ids.to(scores.device), self.bias.to(scores.device)
        return scores.index_add(0, ids, bias)


class Processor(Rule):
    """A caller's own function of the tokens and the scores."""

    bans = "logits_processors"

    def __init__(self, function: Callable[..., Any], prompt: Sequence[int]) -> None:
        self.function, self.form = function, _form(function)
        self.prompt, self.output = list(prompt), list[int]()

    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        # a function that writes into what it gets must harm neither the logits nor the history
        output = [*self.output, *drafts]
        found = self.form(self.function, self.prompt[:], output, scores.clone())
        if not isinstance(found, Tensor) or found.shape != scores.shape:
            given = list(found.shape) if isinstance(found, Tensor) else shown(repr(found))
            raise WrongType(
                f"logits processor {shown(repr(self.function))} must return scores "
                f"{list(scores.shape)}, got {given}"
            )
        if not found.is_floating_point():
            raise WrongType(
                f"logits processor {shown(repr(self.function))} must return scores, which are floats, "
                f"got {found.dtype}; return result.float()"
            )
        most = float(found.max())
        if math.isnan(most) or most == math.inf:
            raise InputError(
                f"logits processor {shown(repr(self.function))} returned NaN or infinity; use -inf to "
                "ban a token, and a finite number otherwise"
            )
        return found.to(scores)

    def observe(self, tokens: Sequence[int]) -> None:
        self.output += tokens


Form = Callable[[Callable[..., Any], list[int], list[int], Tensor], Any]


def _form(function: Callable[..., Any]) -> Form:
    """How a function takes its arguments: like transformers' class, with the prompt or without it."""
    if any(each.__name__ == "LogitsProcessor" for each in type(function).__mro__):
        return _as_transformers
    from inspect import Parameter, signature

    try:
        places = signature(function).parameters.values()
    except ValueError:
        # a function of C that does not tell
        return _with_output
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in places if each.kind in kinds and each.default is Parameter.empty]
    return _with_prompt if len(needed) == 3 else _with_output


def _as_transformers(
    function: Callable[..., Any], prompt: list[int], output: list[int], scores: Tensor
) -> Any:
    ids = torch.tensor([prompt + output], device=scores.device)
    return function(ids, scores[None])[0]


def _with_prompt(
    function: Callable[..., Any], prompt: list[int], output: list[int], scores: Tensor
) -> Any:
    return function(prompt, output, scores)


def _with_output(
    function: Callable[..., Any], prompt: list[int], output: list[int], scores: Tensor
) -> Any:
    return function(output, scores)


class Allowed(Rule):
    """Only some tokens may come."""

    bans = "allowed_token_ids"

    def __init__(self, allowed: Sequence[int], vocab_size: int) -> None:
        self.banned = torch.ones(vocab_size, dtype=torch.bool)
        self.banned[list(allowed)] = False

    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        return scores.masked_fill(self.banned.to(scores.device), -math.inf)


class BadWords(Rule):
    """The last token of a word may not come where it would complete the word."""

    bans = "bad_words"

    def __init__(self, words: Sequence[Sequence[int]], prompt: Sequence[int]) -> None:
        self.words = [tuple(word) for word in words]
        self.reach = max(map(len, words)) - 1
        self.tail: list[int] = []
        self.observe(prompt)

    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        past = (*self.tail, *drafts)
        # word[:-1] against as many of the last tokens; a word of one token has none
        last = [word[-1] for word in self.words if past[len(past) + 1 - len(word) :] == word[:-1]]
        return banned(scores, last)

    def observe(self, tokens: Sequence[int]) -> None:
        tail = [*self.tail, *tokens]
        self.tail = tail[max(0, len(tail) - self.reach) :]


class MinTokens(Rule):
    """What ends an output may not come before `least` tokens."""

    bans = "min_tokens"

    def __init__(self, least: int, ends: Sequence[int]) -> None:
        self.least, self.ends, self.emitted = least, list(ends), 0

    def apply(self, scores: Tensor, drafts: Sequence[int]) -> Tensor:
        return banned(scores, self.ends) if self.emitted + len(drafts) < self.least else scores

    def observe(self, tokens: Sequence[int]) -> None:
        self.emitted += len(tokens)


def banned(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Scores [V] with -inf for `tokens`."""
    if not tokens:
        return scores
    ids = torch.tensor(tokens, dtype=torch.long, device=scores.device)
    return scores.index_fill(0, ids, -math.inf)


GrammarRules = Callable[[Grammar, Collection[int]], Rule]
"""(grammar, tokens that end an output) -> the rule of one sequence; see `linspec.engine.grammar`."""


def make_rules(
    params: SamplingParams,
    prompt: Sequence[int],
    vocab_size: int,
    ends: Sequence[int],
    grammars: GrammarRules | None = None,
) -> list[Rule]:
    """The rules of a request in the order in which they act; bans come last, nothing lifts them."""
    rules: list[Rule] = []
    if params.repetition_penalty != 1:
        rules.append(RepetitionPenalty(params.repetition_penalty, prompt, vocab_size))
    if params.presence_penalty or params.frequency_penalty:
        rules.append(CountPenalty(params.presence_penalty, params.frequency_penalty, vocab_size))
    if params.logit_bias:
        rules.append(Bias(dict(params.logit_bias)))
    rules += [Processor(function, prompt) for function in params.logits_processors]
    if params.allowed_token_ids is not None:
        rules.append(Allowed(params.allowed_token_ids, vocab_size))
    if params.bad_words:
        rules.append(BadWords(_spelled(params), prompt))
    if params.min_tokens and ends:
        rules.append(MinTokens(params.min_tokens, ends))
    if params.grammar is not None:
        if grammars is None:
            raise ConfigError(
                f"a grammar is about text, which only a tokenizer can spell, got {shown(params.grammar)}; "
                "use LLM, or Engine(grammars=Grammars(tokenizer, vocab_size))"
            )
        rules.append(grammars(params.grammar, ends))
    return rules


def _spelled(params: SamplingParams) -> list[tuple[int, ...]]:
    words = []
    for word in params.bad_words:
        if isinstance(word, str):
            raise InputError(
                f"bad_words holds the text {shown(repr(word))}, which only a tokenizer can spell; use LLM, "
                "or give its token ids"
            )
        words.append(word)
    return words
