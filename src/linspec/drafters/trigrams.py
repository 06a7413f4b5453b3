"""A table of trigrams that adapts: what follows two tokens, with weights that grow where it does.

table = Trigrams(pairs=50_000)
table.reinforce([1, 2, 3], 0.04)
table.successors((1, 2))     # ((3, 1.0),): 3 follows, as far as is known
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter

# tokens that are kept for each pair: the heaviest
SUCCESSORS = 12
# a pair whose heaviest token gets heavier than this is halved, so that what it has learned can be unlearned
CAP = 3.0

Pair = tuple[int, int]


class Trigrams:
    """Weights of the tokens behind pairs of tokens, in memory for at most `pairs` pairs.

    The pair that was reinforced longest ago makes room for a new one. A pair takes up to 1.5 kB, about 600
    bytes in the mean.
    """

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self._weights: OrderedDict[Pair, dict[int, float]] = OrderedDict()
        # sorted shares of each pair since it last changed
        self._sorted: dict[Pair, tuple[tuple[int, float], ...]] = {}

    def __len__(self) -> int:
        return len(self._weights)

    def learn(self, tokens: Sequence[int]) -> None:
        """Count the trigrams of a corpus: weights become the shares of each pair."""
        counts = Counter(
            zip(tokens, islice(tokens, 1, None), islice(tokens, 2, None), strict=False)
        )
        found: dict[Pair, dict[int, float]] = {}
        for (first, second, third), times in counts.items():
            found.setdefault((first, second), {})[third] = times
        often = sorted(found.items(), key=lambda each: sum(each[1].values()))
        for pair, times_of in often[-self.pairs :]:
            total = sum(times_of.values())
            heaviest = sorted(times_of.items(), key=itemgetter(1), reverse=True)[:SUCCESSORS]
            self._enter(pair, {token: times / total for token, times in heaviest})

    def reinforce(self, tokens: Sequence[int], gain: float) -> None:
        """Add `gain` to the weight of each trigram of a text, in its order."""
        for i in range(2, len(tokens)):
            pair, token = (tokens[i - 2], tokens[i - 1]), tokens[i]
            weights = self._weights.get(pair)
            if weights is None:
                self._enter(pair, {token: gain})
                continue
            self._sorted.pop(pair, None)
            self._weights.move_to_end(pair)
            if token not in weights and len(weights) == SUCCESSORS:
                del weights[min(weights, key=weights.__getitem__)]
            weights[token] = weights.get(token, 0.0) + gain
            if weights[token] > CAP:
                self._weights[pair] = {each: weight / 2 for each, weight in weights.items()}

    def _enter(self, pair: Pair, weights: dict[int, float]) -> None:
        self._sorted.pop(pair, None)
        self._weights[pair] = weights
        self._weights.move_to_end(pair)
        if len(self._weights) > self.pairs:
            oldest, _ = self._weights.popitem(last=False)
            self._sorted.pop(oldest, None)

    def weight(self, pair: Pair) -> float:
        """The weight of all that follows a pair."""
        return sum(self._weights.get(pair, {}).values())

    def successors(self, pair: Pair) -> tuple[tuple[int, float], ...]:
        """What follows a pair, with its share, the largest first."""
        found = self._sorted.get(pair)
        if found is None:
            weights = self._weights.get(pair, {})
            total = sum(weights.values())
            ranked = sorted(weights.items(), key=itemgetter(1), reverse=True)
            found = tuple((token, weight / total) for token, weight in ranked)
            if found:
                self._sorted[pair] = found
        return found
