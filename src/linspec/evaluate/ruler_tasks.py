"""The texts of three tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654): variables, and counts of words.

    question = write("variables", random.Random(0), units=200, filler=words)
    share = score(answer, question.wanted)

*variables*: assignments, each but the first of the variable before it, stand scattered in running text;
which variables hold the first one's value? *common-words*: of a numbered list, the ten words that it has more
often than all others. *frequent-words*: of a coded text whose words are as frequent as a zeta distribution
says, the three most frequent, dots aside. Wording and words are linspec's own: no model has seen them.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from linspec.errors import ConfigError
from linspec.train.recall_texts import word
from linspec.utils.messages import did_you_mean, shown

_HOPS = 4
# words of running text between two assignments, at least
_PIECE = 12
_COMMON, _OFTEN, _SELDOM = 10, 30, 3
# ... in texts too short for that
_SHORT, _LESS_OFTEN, _ONCE = 600, 5, 1
_FREQUENT, _ALPHA, _KINDS = 3, 2.0, 2000
_DOTS = "..."


@dataclass(frozen=True, slots=True)
class Question:
    """A text with its question, how the answer begins, and the words that it must have."""

    text: str
    begin: str
    wanted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RulerTask:
    """make: (random numbers, units of text, running text) to a question. least: units of the shortest text.

    tokens: of an answer, at most.
    """

    make: Callable[[random.Random, int, Sequence[str]], Question]
    least: int
    tokens: int


def variables(rng: random.Random, units: int, filler: Sequence[str]) -> Question:
    """A chain of assignments in `units` pieces of running text, behind a short example."""
    return _shown_first(_variables(rng, 2 * _HOPS, filler), _variables(rng, units, filler))


def _variables(rng: random.Random, units: int, filler: Sequence[str]) -> Question:
    names = ["".join(rng.sample(string.ascii_uppercase, 5)) for _ in range(_HOPS + 1)]
    value = str(rng.randrange(10_000, 100_000))
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    start = rng.randrange(len(filler))
    pieces = [
        " ".join(filler[(start + _PIECE * at + i) % len(filler)] for i in range(_PIECE))
        for at in range(units)
    ]
    # anywhere, in the order of the chain
    places = sorted(rng.randrange(units + 1) for _ in lines)
    for place, line in reversed(list(zip(places, lines, strict=True))):
        pieces.insert(place, line)
    return Question(
        text="The text below assigns values to variables, here and there.\n\n"
        + "\n".join(pieces)
        + f"\n\nWhich variables have the value {value}, directly or through others? Name all of them.",
        begin=f"The variables with the value {value} are:",
        wanted=tuple(names),
    )


def common_words(rng: random.Random, units: int, filler: Sequence[str]) -> Question:
    """A list of `units` words, ten of which it has often, behind a short example."""
    often, seldom = (_OFTEN, _SELDOM) if units >= _SHORT else (_LESS_OFTEN, _ONCE)
    example = _common_words(rng, 4, 2, 2, 20)
    return _shown_first(example, _common_words(rng, often, seldom, _COMMON, units))


def _common_words(rng: random.Random, often: int, seldom: int, count: int, units: int) -> Question:
    others = max(1, (units - often * count) // seldom)
    words = _invented(rng, count + others)
    common = words[:count]
    drawn = [*common * often, *words[count:] * seldom]
    rng.shuffle(drawn)
    listed = " ".join(f"{at}. {each}" for at, each in enumerate(drawn, 1))
    return Question(
        text="Below is a numbered list of words. Some stand in it far more often than the others.\n\n"
        f"{listed}\n\nWhich {count} words are the most common in the list?",
        begin=f"The {count} most common words are:",
        wanted=tuple(common),
    )


def frequent_words(rng: random.Random, units: int, filler: Sequence[str]) -> Question:
    """A text of `units` coded words: the word of rank k is as likely as k to the power of -2."""
    kinds = [_DOTS, *_invented(rng, min(_KINDS, units))]
    weights = [rank**-_ALPHA for rank in range(1, len(kinds) + 1)]
    while True:
        drawn = rng.choices(kinds, weights, k=units)
        ranked = [each for each in Counter(drawn).most_common() if each[0] != _DOTS]
        # so that the answer is one
        if len(ranked) > _FREQUENT and ranked[_FREQUENT - 1][1] > ranked[_FREQUENT][1]:
            break
    return Question(
        text="Below is a text in code. Find the words that it uses most; dots mean nothing.\n\n"
        f"{' '.join(drawn)}\n\nWhich {_FREQUENT} words, dots aside, are the most frequent in the text?",
        begin=f"The {_FREQUENT} most frequent words are:",
        wanted=tuple(name for name, _ in ranked[:_FREQUENT]),
    )


TASKS = {
    "variables": RulerTask(variables, 2 * _HOPS, 60),
    "common-words": RulerTask(common_words, _LESS_OFTEN * _COMMON + _ONCE, 100),
    "frequent-words": RulerTask(frequent_words, 40, 40),
}


def check_tasks(names: Sequence[str]) -> None:
    """Raise ConfigError for a task that is not there, and for none."""
    if not names:
        raise ConfigError(f"give one task or more of {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            raise ConfigError(
                f"no task {shown(repr(name))}; there are {', '.join(TASKS)}{did_you_mean(name, TASKS)}"
            )


def score(answer: str, wanted: Sequence[str]) -> float:
    """The share of the wanted words that an answer has, each as a whole word."""
    found = set(re.findall(r"\w+", answer))
    return sum(each in found for each in wanted) / len(wanted)


def _shown_first(example: Question, question: Question) -> Question:
    """`question` behind another one with its answer."""
    told = f"{example.text}\n{example.begin} {', '.join(example.wanted)}.\n\n\n"
    return Question(told + question.text, question.begin, question.wanted)


def _invented(rng: random.Random, count: int) -> list[str]:
    """Different words that no text has."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(rng, 3)] = None
    return list(found)
