"""Prompt lookup (Saxena 2023): draft what followed the last few tokens when they came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.decoding.sequence import RunningSequence
from linspec.drafters.base import DRAFTERS, MAX_NODES, ChainDrafter, DrafterContext
from linspec.errors import ConfigError
from linspec.utils.options import option


@dataclass(frozen=True, slots=True)
class LookupOptions:
    """What is looked for, and how much is drafted."""

    max_ngram: int = option("tokens of the longest n-gram that is looked for", default=4)
    min_ngram: int = option("tokens of the shortest", default=2)
    tokens: int = option("most draft tokens of a round", default=MAX_NODES)

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ConfigError(
                "min_ngram must be 1 or more and at most max_ngram, got "
                f"min_ngram={self.min_ngram} and max_ngram={self.max_ngram}"
            )
        if not 1 <= self.tokens <= MAX_NODES:
            raise ConfigError(f"tokens must be in 1..{MAX_NODES}, got {self.tokens}")


@DRAFTERS.register(
    "prompt-lookup",
    summary="copies what followed the same n-gram earlier in the prompt and output",
    paper="Saxena 2023, prompt lookup decoding",
    needs="nothing",
    options=LookupOptions,
)
class PromptLookup(ChainDrafter):
    """Drafts the continuation of the latest earlier match of the longest suffix n-gram.

    The index of n-grams is kept per slot and grows with the sequence, so that drafting costs the same
    at any context.
    """

    confident = True
    model_free = True

    def __init__(
        self, context: DrafterContext | None = None, options: LookupOptions | None = None
    ) -> None:
        super().__init__(context, options)
        options = options or LookupOptions()
        self.max_ngram, self.min_ngram = options.max_ngram, options.min_ngram
        self.max_nodes = options.tokens
        self._ends: dict[int, dict[tuple[int, ...], int]] = {}
        self._indexed: dict[int, int] = {}
        self._seen: dict[int, list[int]] = {}

    def draft(
        self, sequences: Sequence[RunningSequence], lengths: Sequence[int]
    ) -> list[list[int]]:
        return [
            self._continue(sequence, length)
            for sequence, length in zip(sequences, lengths, strict=True)
        ]

    def _continue(self, sequence: RunningSequence, length: int) -> list[int]:
        ends = self._index(sequence)
        for size in range(self.max_ngram, self.min_ngram - 1, -1):
            end = ends.get(tuple(sequence.tokens[-size:]))
            if end is not None:
                return self._seen[sequence.slot][end : end + length]
        return []

    def _index(self, sequence: RunningSequence) -> dict[tuple[int, ...], int]:
        """Where each n-gram last ended, before the very end of the sequence.

        Places count from the source, where an encoder has read one: outputs copy from it.
        """
        ends = self._ends.setdefault(sequence.slot, {})
        seen = self._seen.setdefault(sequence.slot, list(sequence.source))
        done = self._indexed.get(sequence.slot, 0)
        seen += sequence.tokens[len(seen) - len(sequence.source) :]
        for end in range(done, len(seen)):
            for size in range(self.min_ngram, min(self.max_ngram, end) + 1):
                ends[tuple(seen[end - size : end])] = end
        self._indexed[sequence.slot] = max(done, len(seen))
        return ends

    def finished(self, sequence: RunningSequence) -> None:
        for kept in (self._ends, self._indexed, self._seen):
            kept.pop(sequence.slot, None)
