"""SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975): draft how the last tokens went on before.

Two memories are searched: the prompt and output of the request itself, and the outputs of all requests. Every
match of the newest tokens gives a tree of what followed it, likeliest first; a longer match may draft more.
The tree with the highest score, the number of draft tokens that it expects to be accepted, is verified.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget
from linspec.drafters.base import DRAFTERS, MAX_NODES, DrafterContext
from linspec.drafters.counted import Bounds, Counted, CountingDrafter, Draft, grown
from linspec.drafters.occurrences import SIZES, Occurrences
from linspec.errors import ConfigError
from linspec.utils.options import option

# fewer do not make a share
_LEAST_VOTES = 2

# texts and places in them
_Places = list[tuple[list[int], int]]


@dataclass(frozen=True, slots=True)
class SuffixOptions:
    """How long matches are, how much each drafts, and what is remembered."""

    depth: int = option("tokens of the longest match", default=64)
    shortest: int = option("tokens of the shortest match that drafts", default=2)
    factor: float = option("draft tokens for each token of a match", default=2.0)
    offset: float = option("draft tokens beside these", default=0.0)
    min_prob: float = option("chance below which a token is not drafted", default=0.1)
    tokens: int = option("most draft tokens of a round", default=MAX_NODES)
    votes: int = option("newest places of a match that are counted", default=32)
    requests: int = option("finished requests whose outputs are kept; 0 keeps none", default=10_000)
    memory: int = option("most tokens of these outputs, about 300 bytes each", default=200_000)

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.depth:
            raise ConfigError(
                f"shortest must be 1 or more and at most depth, got {self.shortest} and {self.depth}"
            )
        if not 0 < self.min_prob <= 1:
            raise ConfigError(f"min_prob must be above 0 and at most 1, got {self.min_prob}")
        if self.factor < 0:
            raise ConfigError(f"factor must be 0 or more, got {self.factor}")
        if not 1 <= self.tokens <= MAX_NODES:
            raise ConfigError(f"tokens must be in 1..{MAX_NODES}, got {self.tokens}")
        if self.votes < _LEAST_VOTES:
            raise ConfigError(f"votes must be {_LEAST_VOTES} or more, got {self.votes}")
        if min(self.requests, self.memory) < 0:
            raise ConfigError(
                f"requests and memory must be 0 or more, got {self.requests} and {self.memory}"
            )

    def limit(self, length: int) -> int:
        """Most draft tokens behind a match of `length` tokens."""
        return max(0, min(self.tokens, int(self.factor * length + self.offset)))


@dataclass(slots=True)
class _Own:
    """What is kept of a running request.

    text: its number in `texts`. output: that of its output in the shared memory, 0 before there is any. read:
    tokens that both have.
    """

    texts: Occurrences
    text: int
    output: int = 0
    read: int = 0


@DRAFTERS.register(
    "suffix",
    summary="trees of what followed the longest match in this request and in all earlier outputs",
    paper="Oliaro et al. 2024 (SuffixDecoding), arXiv 2411.04975",
    needs="nothing",
    options=SuffixOptions,
)
class Suffix(CountingDrafter):
    """Drafts from memory, without a model; remembers the outputs of requests that have ended.

    A count is a share of the newest `votes` places of a match, corrected by how often drafts from matches
    of that length came true.
    """

    def __init__(
        self, context: DrafterContext | None = None, options: SuffixOptions | None = None
    ) -> None:
        super().__init__(context, options)
        self.options = options or SuffixOptions()
        self.max_nodes = self.options.tokens
        self._outputs = self._memory()
        # outputs of requests that have ended, the oldest first
        self._kept: deque[int] = deque()
        self._own: dict[int, _Own] = {}

    def _memory(self) -> Occurrences:
        return Occurrences(self.options.depth, self.options.votes)

    def started(self, sequence: RunningSequence) -> None:
        # another engine may have left a sequence of this number
        self._close(sequence.number)
        self._read(sequence)

    def _read(self, sequence: RunningSequence) -> _Own:
        """What is kept of a request, with all its tokens."""
        own = self._own.get(sequence.number)
        if own is None:
            texts = self._memory()
            own = _Own(texts, texts.open())
            own.texts.extend(own.text, sequence.source)
            self._own[sequence.number] = own
        new = sequence.tokens[own.read :]
        own.texts.extend(own.text, new)
        output = new[max(0, sequence.prompt_length - own.read) :]
        if output and self.options.requests:
            own.output = own.output or self._outputs.open()
            self._outputs.extend(own.output, output)
        own.read = len(sequence.tokens)
        return own

    def grow(self, sequence: RunningSequence, budget: Budget) -> Draft:
        own = self._read(sequence)
        context = own.texts.text(own.text)[-self.options.depth :]
        ends = sequence.sampler.ends
        bounds = Bounds(budget.nodes, budget.depth, self.options.min_prob, ends)
        local = self._best(own.texts, context, bounds, Draft())
        return self._best(self._outputs, context, bounds, local)

    def _best(self, texts: Occurrences, context: list[int], bounds: Bounds, best: Draft) -> Draft:
        """The draft with the highest score, of a longer match where several have it, or `best`."""
        longest = len(context)
        for size in SIZES:
            if size > longest:
                continue
            if longest < self.options.shortest or self._settled(best, longest, bounds):
                break
            matches = texts.matches(context, size)
            # between these lengths the places are the same
            lengths = {min(each.length, longest) for each in matches}
            for length in sorted(lengths, reverse=True):
                if length < self.options.shortest:
                    break
                if self._settled(best, length, bounds):
                    break
                places = [(each.text, each.end) for each in matches if each.length >= length]
                draft = self._behind(places, length, bounds)
                if draft.score > best.score:
                    best = draft
            longest = size - 1
        return best

    def _settled(self, best: Draft, length: int, bounds: Bounds) -> bool:
        """Whether no match of at most `length` tokens can have a higher score."""
        nodes = min(bounds.nodes, self.options.limit(length))
        # of as many tokens, a chain that nothing contradicts is surest behind the longest match
        certain = best.tokens and min(best.shares) == 1.0 and best.evidence[0] >= length
        return nodes <= best.score or bool(certain and nodes <= len(best.tokens))

    def _behind(self, places: _Places, length: int, bounds: Bounds) -> Draft:
        """What follows a match of `length` tokens."""

        def follow(places: _Places, depth: int) -> tuple[list[Counted], int]:
            # when these drafts are asked about, those before were right: the match is longer
            return _followers(places), length + depth

        nodes = min(bounds.nodes, self.options.limit(length))
        return grown(places, follow, replace(bounds, nodes=nodes), self.trust)

    def paused(self, sequence: RunningSequence) -> Any:
        """Which output was kept: if it ends here, it counts as one that has ended."""
        own = self._read(sequence)
        self.finished(sequence)
        return own.output

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        # it is read again as a whole, and counts once
        if kept in self._kept:
            self._kept.remove(kept)
            self._outputs.remove(kept)
        self.started(sequence)

    def finished(self, sequence: RunningSequence) -> None:
        super().finished(sequence)
        self._read(sequence)
        self._close(sequence.number)

    def _close(self, number: int) -> None:
        """Keep the output of a sequence that has ended, and forget the oldest ones if they are too many."""
        own = self._own.pop(number, None)
        if own is not None and own.output:
            self._kept.append(own.output)
        while self._kept and (
            len(self._kept) > self.options.requests or self._outputs.tokens > self.options.memory
        ):
            self._outputs.remove(self._kept.popleft())


def _followers(places: _Places) -> list[Counted]:
    """Which tokens follow at these places, and the places behind each."""
    groups: dict[int, _Places] = {}
    for text, end in places:
        if end < len(text):
            groups.setdefault(text[end], []).append((text, end + 1))
    total = sum(map(len, groups.values()))
    return [Counted(token, len(group) / total, group) for token, group in groups.items()]
