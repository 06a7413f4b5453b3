"""ADED (Liu et al. 2024, arXiv 2407.12021): a table of trigrams that adapts, searched for a tree of drafts.

The paper searches by 150 iterations of Monte-Carlo tree search with the PUCT rule. Its exploration (c1 = 32)
outweighs the rewards that so few iterations see, so they visit nodes in proportion to the product of the
shares on their paths. Here the nodes are taken in that order, exactly and without iterations.
`tests/drafters/test_aded.py` compares the trees of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget
from linspec.drafters.base import DRAFTERS, MAX_NODES, DrafterContext
from linspec.drafters.counted import Bounds, Counted, CountingDrafter, Draft, grown
from linspec.drafters.trigrams import Pair, Trigrams
from linspec.errors import ConfigError, DrafterError
from linspec.utils.options import option


@dataclass(frozen=True, slots=True)
class AdedOptions:
    """What the table begins with, how fast it adapts, and how large trees may be."""

    table: Path | None = option(
        "a text file whose trigrams are known from the start; none learns from the requests alone",
        default=None,
        short=True,
    )
    depth: int = option("greatest depth of a tree", default=5)
    min_prob: float = option("chance below which a token is not drafted", default=0.02)
    tokens: int = option("most draft tokens of a round", default=MAX_NODES)
    window: int = option("newest tokens that are reinforced in every round", default=16)
    gain: float = option("what a trigram gains each time", default=0.04)
    pairs: int = option("pairs of tokens that are remembered, about 600 bytes each", default=50_000)

    def __post_init__(self) -> None:
        for name in ("depth", "pairs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.min_prob <= 1:
            raise ConfigError(f"min_prob must be above 0 and at most 1, got {self.min_prob}")
        if not 1 <= self.tokens <= MAX_NODES:
            raise ConfigError(f"tokens must be in 1..{MAX_NODES}, got {self.tokens}")
        if self.window < 0:
            raise ConfigError(f"window must be 0 or more, got {self.window}")
        if not 0 <= self.gain <= 1:
            raise ConfigError(f"gain must be in 0..1, got {self.gain}; 0 freezes the table")


@DRAFTERS.register(
    "aded",
    summary="the likeliest tree by a table of trigrams that adapts to what is written",
    paper="Liu et al. 2024 (ADED), arXiv 2407.12021",
    needs="nothing; a text of the same kind helps: aded:table=FILE",
    options=AdedOptions,
)
class Aded(CountingDrafter):
    """Trees from trigrams, learned from all requests while they run.

    Tokens are reinforced once when they are new, and again in each round as long as they are among the
    newest `window`.
    """

    def __init__(
        self, context: DrafterContext | None = None, options: AdedOptions | None = None
    ) -> None:
        super().__init__(context, options)
        self.options = options or AdedOptions()
        self.max_nodes = self.options.tokens
        self.table = Trigrams(self.options.pairs)
        # of each running request, tokens that are in the table
        self._learned: dict[int, int] = {}

    @classmethod
    def build(cls, context: DrafterContext, options: AdedOptions) -> Self:
        """With the trigrams of a file, if one is named."""
        made = cls(context, options)
        if options.table is not None:
            made.table.learn(_tokens(options.table, context.tokenizer))
        return made

    def started(self, sequence: RunningSequence) -> None:
        # another engine may have left a sequence of this number
        self._learned.pop(sequence.number, None)
        self._learn(sequence)

    def _learn(self, sequence: RunningSequence) -> None:
        """Reinforce what is new and what is newest; once for each length of the sequence."""
        known, tokens = self._learned.get(sequence.number, 0), sequence.tokens
        if self.options.gain and len(tokens) > known:
            # a trigram is new if its last token is
            new = max(0, min(known - 2, len(tokens) - self.options.window))
            self.table.reinforce(tokens[new:], self.options.gain)
        self._learned[sequence.number] = len(tokens)

    def grow(self, sequence: RunningSequence, budget: Budget) -> Draft:
        self._learn(sequence)
        if len(sequence.tokens) < 2:
            return Draft()
        options, (first, second) = self.options, sequence.tokens[-2:]
        depth = min(budget.depth, options.depth)
        bounds = Bounds(budget.nodes, depth, options.min_prob, sequence.sampler.ends)
        return grown((first, second), self._follow, bounds, self.trust)

    def _follow(self, pair: Pair, depth: int) -> tuple[list[Counted], int]:
        """What follows a pair, and how often it was reinforced."""
        found = self.table.successors(pair)
        counted = [Counted(token, share, (pair[1], token)) for token, share in found]
        return counted, round(self.table.weight(pair) / (self.options.gain or 1.0))

    def paused(self, sequence: RunningSequence) -> Any:
        """How much was learned of it, so that nothing is learned twice."""
        learned = self._learned.get(sequence.number, 0)
        self.finished(sequence)
        return learned

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        self._learned[sequence.number] = kept

    def finished(self, sequence: RunningSequence) -> None:
        super().finished(sequence)
        self._learn(sequence)
        del self._learned[sequence.number]


def _tokens(file: Path, tokenizer: Any) -> Sequence[int]:
    """Token ids of a text file."""
    if tokenizer is None:
        raise DrafterError(
            f"drafter 'aded' reads {file} with the tokenizer of the model, and none was given"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DrafterError(
            f"drafter 'aded' cannot read the text {file}: {error}; name a text file in UTF-8"
        ) from error
    ids: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids
