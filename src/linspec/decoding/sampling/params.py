"""What a request asks of generation, checked when it is written down.

params = SamplingParams(n=2, temperature=0.8, min_p=0.05, seed=1, bad_words=["foo"])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np

from linspec.decoding.sampling.grammar import Grammar
from linspec.errors import ConfigError
from linspec.utils.messages import quoted, shown
from linspec.utils.sizes import check_size

# below this, scores divided by the temperature leave float32
MIN_TEMPERATURE = 1e-6
# what a request may ask for at once
MOST_SEQUENCES = 1024
_NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_SWITCHES = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks of generation, checked when it is made.

    Attributes:
        max_tokens: most tokens of the output, 1 or more.
        n: sequences of the request, each with its own random numbers. The first is the one of n = 1.
        temperature: 0 takes the likeliest token; otherwise the scores are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: then keep the fewest tokens whose probabilities add up to p (Holtzman et al. 2019,
            arXiv 1904.09751); 1.0 keeps all.
        min_p: then keep the tokens that are at least this many times as likely as the likeliest one
            (Nguyen et al. 2024, arXiv 2407.01082); 0 keeps all.
        repetition_penalty: a factor above 1 makes the tokens of prompt and output less likely (Keskar et
            al. 2019, arXiv 1909.05858); 1.0 changes nothing.
        presence_penalty: subtracted from the score of every token that the output holds.
        frequency_penalty: subtracted once for each time that the output holds the token.
        logit_bias: added to the scores of single token ids; -inf bans a token.
        allowed_token_ids: the only tokens that the output may hold; None allows all.
        bad_words: texts that the output never completes, as the tokenizer spells them at the start of a
            text and behind a space; or tuples of token ids.
        logits_processors: functions (output, scores) or (prompt, output, scores) -> scores [vocab], where
            prompt and output are lists of token ids; or LogitsProcessors of transformers. Drafts ask them
            about tokens that may never come: the answer must depend on the arguments alone.
        grammar: what the output must be: a JSON schema, a regular expression, a grammar; None for anything.
            The output is complete unless `max_tokens` or a stop text cuts it.
        min_tokens: tokens before which nothing ends the output.
        stop: texts that end the output; one string is one text.
        stop_token_ids: tokens that end the output, beside the end-of-sequence tokens of the model.
        include_stop_str_in_output: keep the stop text or stop token in the text.
        ignore_eos: go on after an end-of-sequence token.
        skip_special_tokens: leave special tokens out of the text.
        seed: equal seeds give equal outputs; None takes fresh entropy.
        logprobs: report the log-probability of each output token under the model itself, with the k
            likeliest tokens; None reports nothing.
        prompt_logprobs: the same for the tokens of the prompt.

    Raises:
        ConfigError: a setting breaks a rule.
    """

    max_tokens: int = 128
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    logits_processors: tuple[Callable[..., Any], ...] = field(default=(), hash=False)
    grammar: Grammar | None = None
    min_tokens: int = 0
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_tokens",
            "min_tokens",
            "n",
            "top_k",
            "seed",
            "logprobs",
            "prompt_logprobs",
        ):
            self._set(name, _plain(getattr(self, name)))
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(f"logit_bias must be a mapping, got {shown(repr(self.logit_bias))}")
        self._set("logit_bias", dict(self.logit_bias))
        self._set("stop", _texts("stop", self.stop))
        self._set("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        self._set("bad_words", _words(self.bad_words))
        self._set("logits_processors", _functions(self.logits_processors))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
        self._check_lengths()
        self._check_warpers()
        self._check_penalties()
        self._check_bans()
        self._check_grammar()

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is taken and nothing is random."""
        return self.temperature == 0

    def sequences(self) -> tuple[SamplingParams, ...]:
        """The parameters of each of the n sequences, with n = 1; a seed and the number give the new seeds."""
        if self.n == 1:
            return (self,)
        # the prompt is the same for all: one of them tells about it
        first, others = replace(self, n=1), replace(self, n=1, prompt_logprobs=None)
        return (first, *(replace(others, seed=self._seed(i)) for i in range(1, self.n)))

    def _seed(self, sequence: int) -> int | None:
        if self.seed is None:
            return None
        words = np.random.SeedSequence((self.seed, sequence)).generate_state(1, np.uint64)
        return int(words[0])

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_lengths(self) -> None:
        check_size("max_tokens", self.max_tokens)
        check_size("min_tokens", self.min_tokens, least=0)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens must be at most max_tokens, got {self.min_tokens} and {self.max_tokens}; "
                "raise max_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name), least=0)
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**64):
            raise ConfigError(
                f"seed must be a whole number from 0 to 2**64 - 1, got {quoted(self.seed)}; use None for "
                "fresh entropy"
            )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be True or False, got {shown(repr(getattr(self, name)))}"
                )
        self._check_count()

    def _check_count(self) -> None:
        check_size("n", self.n)
        if self.n > MOST_SEQUENCES:
            raise ConfigError(
                f"n must be at most {MOST_SEQUENCES}, got {shown(self.n)}; give the prompt several times"
            )
        if self.n > 1 and self.temperature == 0:
            raise ConfigError(
                f"n must be 1 at temperature 0, got {self.n}: all sequences would be the same; set a "
                "temperature such as 0.8"
            )

    def _check_warpers(self) -> None:
        for name in _NUMBERS:
            value: Any = getattr(self, name)
            known = isinstance(value, int | float | np.floating | np.integer)
            if isinstance(value, bool) or not known:
                raise ConfigError(f"{name} must be a number, got {shown(repr(value))}")
            if isinstance(value, np.floating | np.integer):
                self._set(name, float(value))
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
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be from 0 (keep all) to 1, got {self.min_p}")

    def _check_penalties(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty must be finite and above 0, got {self.repetition_penalty}; "
                "use 1.0 for none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ConfigError(
                    f"{name} must be from -2 to 2, got {getattr(self, name)}; use 0 for none"
                )

    def _check_bans(self) -> None:
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or not isinstance(bias, int | float):
                raise ConfigError(
                    f"logit_bias maps token ids to numbers, got {shown(repr(token))}: {shown(repr(bias))}"
                )
            if math.isnan(bias) or bias == math.inf:
                raise ConfigError(
                    f"logit_bias of token {token} must be a finite number or -inf, got {bias}"
                )
        if self.allowed_token_ids == ():
            raise ConfigError(
                "allowed_token_ids must hold at least one token, got none; use None to allow all"
            )

    def _check_grammar(self) -> None:
        if self.grammar is None:
            return
        if not isinstance(self.grammar, Grammar):
            raise ConfigError(
                f"grammar must be a Grammar, got {shown(repr(self.grammar))}; use Grammar.json_schema, "
                "Grammar.regex or Grammar.cfg"
            )
        if self.ignore_eos:
            raise ConfigError(
                "ignore_eos must be False with a grammar, got True: nothing may come behind an output that "
                "is complete; leave one of them out"
            )


def _plain(value: Any) -> Any:
    """A whole number of another library, such as numpy's, as Python's own; anything else as it is."""
    return value if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def _items(name: str, what: str, given: Any) -> tuple[Any, ...]:
    """What a setting lists; raises ConfigError for what is no list."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ConfigError(f"{name} must hold {what}, got {shown(repr(given))}")
    return tuple(given)


def _texts(name: str, given: Any) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else _items(name, "texts", given)
    if not all(isinstance(text, str) and text for text in found):
        raise ConfigError(
            f"{name} must hold non-empty strings, got {shown(repr(found))}; use () for none"
        )
    return found


def _ids(name: str, given: Any) -> tuple[int, ...]:
    found = tuple(_plain(token) for token in _items(name, "token ids", given))
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(
                f"{name} must hold token ids, whole numbers from 0 on, got {shown(repr(token))}"
            )
    return found


def _words(given: Any) -> tuple[str | tuple[int, ...], ...]:
    found: list[str | tuple[int, ...]] = []
    for word in _items("bad_words", "texts or lists of token ids", given):
        found.append(word if isinstance(word, str) else _ids("bad_words", word))
        if not found[-1]:
            raise ConfigError("bad_words must not hold an empty word; leave it out")
    return tuple(found)


def _functions(given: Any) -> tuple[Callable[..., Any], ...]:
    found = _items("logits_processors", "functions", () if given is None else given)
    for each in found:
        if not callable(each):
            raise ConfigError(
                f"logits_processors must hold functions (output, scores) -> scores, got "
                f"{shown(repr(each))}"
            )
    return found
