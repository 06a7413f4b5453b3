"""ParallelBench's waiting lines (arXiv 2510.04767): trivial tasks, unless several tokens are decided at once.

    question = ask("shuffle", 4, random.Random(0))
    question.right(answer), one_step_ceiling("shuffle", 4), ceiling(question.accepted, [2, 2])

A forward that decides several tokens draws each from its own distribution, as if the others did not matter.
Where several answers are right, even a perfect model then mixes them up: the ceilings say how often.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.sizes import check_size

Items = tuple[int, ...]
# an item, one behind it in every sense of order, and what a question may bring in
ALPHABET = 16
# items of a line: all of its orders are listed
LONGEST = 7


@dataclass(frozen=True, slots=True)
class Question:
    """A line of different items, whose numbers are their order, and what to do with it.

    index and word: the place that a task is about and the new item, None where it has none.
    """

    task: str
    items: Items
    index: int | None = None
    word: int | None = None

    @property
    def accepted(self) -> list[Items]:
        """All right answers; a perfect model finds them equally likely."""
        return sorted({*TASKS[self.task].answers(self)})

    @property
    def length(self) -> int:
        """Items of an answer."""
        return len(self.items) + TASKS[self.task].grows

    def right(self, answer: Items) -> bool:
        """Whether it is one of these."""
        return answer in self.accepted

    def answer(self, rng: random.Random) -> Items:
        """One of the right answers; each is equally likely."""
        kind = TASKS[self.task]
        if kind.draw is not None:
            return kind.draw(self, rng)
        return rng.choice(list(kind.answers(self)))


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question.

    told: how a prompt says it; {index} and {word} stand for what a question is about. answers: all that are
    right. one_step: how often a perfect model of n items is right if it draws all of them at once. grows:
    items of an answer beyond those of the line. draw: an answer without listing all of them.
    """

    told: str
    answers: Callable[[Question], Iterable[Items]]
    one_step: Callable[[int], float] = lambda n: 1.0
    grows: int = 0
    draw: Callable[[Question, random.Random], Items] | None = None

    @property
    def by_index(self) -> bool:
        """Whether a question names a place."""
        return "{index}" in self.told

    @property
    def brings(self) -> bool:
        """Whether a question names a new item."""
        return "{word}" in self.told


def _inserted(question: Question, places: Iterable[int]) -> Iterable[Items]:
    items, word = question.items, question.word
    assert word is not None
    return ((*items[:at], word, *items[at:]) for at in places)


def _removed(question: Question, places: Iterable[int]) -> Iterable[Items]:
    return (question.items[:at] + question.items[at + 1 :] for at in places)


def _replaced(question: Question, places: Iterable[int]) -> Iterable[Items]:
    items, word = question.items, question.word
    assert word is not None
    return ((*items[:at], word, *items[at + 1 :]) for at in places)


def _places(question: Question, more: int = 0) -> range:
    """The places that a question may mean: the one that it names, or all."""
    if question.index is not None:
        return range(question.index, question.index + 1)
    return range(len(question.items) + more)


def _shuffled(question: Question, rng: random.Random) -> Items:
    return tuple(rng.sample(question.items, len(question.items)))


def _insert_at_once(n: int) -> float:
    """Place j holds the new item, item j or item j - 1, by where it went: at j, behind j, before j."""
    ways = [
        [(n - j if j < at else 1 if j == at else j) / (n + 1) for j in range(n + 1)]
        for at in range(n + 1)
    ]
    return sum(map(math.prod, ways))


def _remove_at_once(n: int) -> float:
    """Place j holds item j if what went stood behind it, else item j + 1."""
    ways = [[(n - 1 - j if j < at else j + 1) / n for j in range(n - 1)] for at in range(n)]
    return sum(map(math.prod, ways))


TASKS = {
    "copy": Task("Copy the line.", lambda q: [q.items]),
    "reverse": Task("Reverse the line.", lambda q: [q.items[::-1]]),
    "sort": Task("Sort the line alphabetically.", lambda q: [tuple(sorted(q.items))]),
    "insert-index": Task(
        "Insert {word} at position {index}.", lambda q: _inserted(q, _places(q)), grows=1
    ),
    "remove-index": Task(
        "Remove the person at position {index}.", lambda q: _removed(q, _places(q)), grows=-1
    ),
    "replace-index": Task(
        "Replace the person at position {index} by {word}.", lambda q: _replaced(q, _places(q))
    ),
    "insert-random": Task(
        "Insert {word} at a random position.",
        lambda q: _inserted(q, _places(q, 1)),
        _insert_at_once,
        grows=1,
    ),
    "remove-random": Task(
        "Remove a random person.", lambda q: _removed(q, _places(q)), _remove_at_once, grows=-1
    ),
    "replace-random": Task(
        "Replace a random person by {word}.",
        lambda q: _replaced(q, _places(q)),
        lambda n: (1 - 1 / n) ** (n - 1),
    ),
    "shuffle": Task(
        "Shuffle the line randomly.",
        # the line itself is one of its orders: so the ceiling has a closed form
        lambda q: itertools.permutations(q.items),
        lambda n: math.factorial(n) / n**n,
        draw=_shuffled,
    ),
}


def check_task(name: str) -> None:
    """Raise ConfigError unless `name` is one of TASKS."""
    if name not in TASKS:
        raise ConfigError(
            f"unknown task {shown(repr(name))}; known: {', '.join(TASKS)}{did_you_mean(name, TASKS)}"
        )


def check_length(length: int) -> None:
    """Raise ConfigError for a line that has no task, or more orders than can be listed."""
    check_size("lengths", length, least=2)
    if length > LONGEST:
        raise ConfigError(f"lengths must be at most {LONGEST} items, got {length}")


def ask(task: str, length: int, rng: random.Random) -> Question:
    """A question about a line of `length` items."""
    kind = TASKS[task]
    *items, word = rng.sample(range(ALPHABET), length + 1)
    places = length + max(0, kind.grows)
    index = rng.randrange(places) if kind.by_index else None
    return Question(task, tuple(items), index, word if kind.brings else None)


def one_step_ceiling(task: str, length: int) -> float:
    """How often a perfect model is right that draws its whole answer at once; closed forms."""
    return TASKS[task].one_step(length)


def shares(length: int, each: int) -> list[int]:
    """Tokens that the forwards decide of `length`, at most `each`, as the policy `static` divides them."""
    left, found = length, list[int]()
    for step in range(math.ceil(length / each), 0, -1):
        found.append(-(-left // step))
        left -= found[-1]
    return found


def ceiling(accepted: Sequence[Items], shares: Sequence[int]) -> float:
    """How often a perfect model is right that draws its answer in such shares, from left to right.

    Exactly: each share of tokens is drawn from the distributions of its places, given what stands before.
    """
    if not shares:
        return 1.0
    count, total = shares[0], len(accepted)
    marginals = [Counter(answer[place] for answer in accepted) for place in range(count)]
    rests: dict[Items, list[Items]] = {}
    for answer in accepted:
        rests.setdefault(answer[:count], []).append(answer[count:])
    return sum(
        math.prod(marginals[place][item] / total for place, item in enumerate(begun))
        * ceiling(rest, shares[1:])
        for begun, rest in rests.items()
    )


def total_correlation(accepted: Sequence[Items]) -> float:
    """Nats that a forward for the whole answer loses: the entropies of its places less that of the answer."""
    total = len(accepted)
    entropies = (
        -sum(n / total * math.log(n / total) for n in Counter(places).values())
        for places in zip(*accepted, strict=True)
    )
    return max(0.0, sum(entropies) - math.log(total))
