"""How the questions of ParallelBench are written: a token for each item, or names in a text."""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from linspec.engine.results import Generation
from linspec.evaluate.parallel_tasks import ALPHABET, LONGEST, TASKS, Items, Question, ask

# in alphabetical order: the numbers of items are their order
NAMES = (
    "Ada Moreno", "Ben Fischer", "Carla Dunn", "David Okafor", "Elena Petrov", "Felix Brandt",
    "Grace Kim", "Hugo Laurent", "Irene Walsh", "Jonas Berg", "Kira Tanaka", "Leo Castro",
    "Mona Haddad", "Nils Eriksen", "Olga Novak", "Paul Reyes",
)  # fmt: skip
# tokens of a tiny model: items, tasks, places, and three of their own
_TASK = {name: ALPHABET + at for at, name in enumerate(TASKS)}
_PLACE = ALPHABET + len(TASKS)
_PLACES = LONGEST + 1
NOTHING, EQUALS, MASK = range(_PLACE + _PLACES, _PLACE + _PLACES + 3)
VOCABULARY = MASK + 1
# masks for an answer in words
CANVAS = 64


class Form(ABC):
    """How a question is asked of a model, and what its output says."""

    @abstractmethod
    def prompt(self, question: Question) -> list[int] | str:
        """What the model is given."""

    @abstractmethod
    def masks(self, question: Question) -> int:
        """Positions of the output."""

    @abstractmethod
    def read(self, found: Generation) -> Items | None:
        """The items of an output, None where something in it is no item."""

    def strict(self, found: Generation) -> bool:
        """Whether the output has the form that was asked for to the letter."""
        return True


class Numbers(Form):
    """A token for each item, and no token for the end: an answer has exactly the items of a right one."""

    def prompt(self, question: Question) -> list[int]:
        place = NOTHING if question.index is None else _PLACE + question.index
        word = NOTHING if question.word is None else question.word
        # lines of all lengths end at the same position
        gap = [NOTHING] * (LONGEST - len(question.items))
        return [_TASK[question.task], word, place, *question.items, *gap, EQUALS]

    def masks(self, question: Question) -> int:
        return question.length

    def read(self, found: Generation) -> Items | None:
        return found.token_ids


class Digits:
    """In place of a tokenizer: the text of a token is its number."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return " ".join(map(str, tokens))


class Names(Form):
    """Names in quotes, behind one worked example, as the benchmark asks language models."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self.tokenizer, self.seed = tokenizer, seed

    def prompt(self, question: Question) -> list[int] | str:
        rng = random.Random(f"example {self.seed} {question.task}")
        example = ask(question.task, 3, rng)
        shown = f"{_told(example)} {_list(example.answer(rng))}\n\n{_told(question)}"
        return f"A waiting line is a list of names. Positions count from 0.\n\n{shown}"

    def masks(self, question: Question) -> int:
        return CANVAS

    def read(self, found: Generation) -> Items | None:
        names = re.findall(r'"([^"]*)"', found.text.partition("]")[0])
        return tuple(map(NAMES.index, names)) if names and {*names} <= {*NAMES} else None

    def strict(self, found: Generation) -> bool:
        head, end, _ = found.text.strip().partition("]")
        try:
            return isinstance(json.loads(head + end), list)
        except ValueError:
            return False


def _list(items: Items) -> str:
    return json.dumps([NAMES[item] for item in items])


def _told(question: Question) -> str:
    word = "" if question.word is None else NAMES[question.word]
    told = TASKS[question.task].told.format(index=question.index, word=word)
    return f"Line: {_list(question.items)}\n{told}\nNew line:"
