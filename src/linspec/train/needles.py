"""Chats that ask for what was said once, far above: needles in running text.

    writer = NeedleWriter(tokenizer, stream, WORDINGS)
    needles = writer.batch(rows=8, length=2048, keys=4, asked=2, rng=random.Random(0))

A user's message is running text with a few sentences in it that give a name a number; then each turn asks
for one of the numbers. The assistant's turns are written up to the number, so that nothing hangs on how a
model words an answer. Evaluation has sentences of its own (`linspec.evaluate.needles`): a model is never
measured on a wording that it was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from linspec.errors import ConfigError
from linspec.train.data import Windows
from linspec.train.recall_texts import word

_DIGITS = 5
_TRIES = 1000
_MOST_KEYS = 6


@dataclass(frozen=True, slots=True)
class Wording:
    """How a needle is said, asked for, and how the answer begins."""

    line: str
    question: str
    answer: str


WORDINGS = (
    Wording(
        "The parcel for {name} has the tracking code {value}.",
        "What is the tracking code of the parcel for {name}?",
        "The tracking code of the parcel for {name} is",
    ),
    Wording(
        "Note: invoice {name} was filed under {value}.",
        "Under what was invoice {name} filed?",
        "Invoice {name} was filed under",
    ),
    Wording(
        "In the year of the count, {name} had {value} inhabitants.",
        "How many inhabitants did {name} have?",
        "{name} had",
    ),
    Wording(
        "My phone extension is {value}, said {name}.",
        "Which phone extension did {name} give?",
        "{name} gave the extension",
    ),
)


@dataclass(frozen=True, slots=True)
class Needles:
    """Texts [B, T] and the places [B, A] of the digits in them that a model must predict."""

    tokens: torch.Tensor
    places: torch.Tensor

    def marked(self) -> torch.Tensor:
        """The texts with tokens at those places as -1 - id, as `KlLoss` takes them."""
        values = self.tokens.gather(1, self.places)
        return self.tokens.scatter(1, self.places, -1 - values)


def most_keys(length: int) -> int:
    """Needles of which a chat of so many tokens has room to ask for each."""
    return max(1, min(_MOST_KEYS, length // 128))


class NeedleWriter:
    """Writes such chats in the tokens of one model.

    filler: running text, as a stream of tokens. names: those to choose from; None invents them. clear: so
    many tokens of running text before the questions have no needle. Where the tokenizer has no chat
    template, turns are lines.
    """

    def __init__(
        self,
        tokenizer: Any,
        filler: np.ndarray,
        wordings: Sequence[Wording],
        names: Sequence[str] | None = None,
        clear: int = 0,
    ) -> None:
        self.tokenizer, self.filler, self.clear = tokenizer, filler, clear
        self.wordings, self.names = tuple(wordings), names
        self.head, self.ask, self.again = (self._ids(piece) for piece in _turns(tokenizer))
        # tokens of a number that say something
        self.width = self._width("48213")

    def batch(
        self,
        rows: int,
        length: int,
        *,
        keys: int,
        asked: int,
        rng: random.Random,
        depth: float | None = None,
        apart: bool = False,
    ) -> Needles:
        """`rows` chats of `length` tokens, each with `keys` needles of which `asked` are asked for.

        depth: where the needle that is asked for first stands, 0 for the beginning; None for anywhere. apart:
        each needle has a wording of its own, so that none is mistaken for another.
        """
        made = [self.chat(length, keys, asked, rng, depth, apart) for _ in range(rows)]
        tokens, places = zip(*made, strict=True)
        return Needles(torch.tensor(tokens), torch.tensor(places))

    def chat(
        self,
        length: int,
        keys: int,
        asked: int,
        rng: random.Random,
        depth: float | None = None,
        apart: bool = False,
    ) -> tuple[list[int], list[int]]:
        """The tokens of one chat, and the places of its answers' digits; see `batch`."""
        wordings = self._chosen(keys, rng, apart)
        names = self._names(keys, rng)
        needles = [
            (wording, name, self._value(rng)) for wording, name in zip(wordings, names, strict=True)
        ]
        lines = [
            self._ids("\n" + wording.line.format(name=name, value=value) + "\n")
            for wording, name, value in needles
        ]
        tail: list[int] = []
        ends: list[int] = []
        for turn, (wording, name, value) in enumerate(needles[:asked]):
            question = ("\n\n" if turn == 0 else "") + wording.question.format(name=name)
            tail += (self.again if turn else []) + self._ids(question) + self.ask
            # apart, so that an answer's tokens do not depend on what stands before them
            tail += self._ids(wording.answer.format(name=name)) + self._ids(f" {value}")
            ends.append(len(tail))
        room = length - len(self.head) - len(tail) - sum(map(len, lines))
        if room - self.clear < keys:
            raise ConfigError(
                f"a chat of {length} tokens has no room for {keys} needles and {asked} questions; choose a "
                "--context of at least a few hundred"
            )
        text = self.head + self._with_lines(room, lines, rng, depth) + tail
        border = length - len(tail)
        places = [border + end - back for end in ends for back in range(self.width, 0, -1)]
        return text, places

    def _with_lines(
        self, room: int, lines: Sequence[list[int]], rng: random.Random, depth: float | None
    ) -> list[int]:
        """`room` tokens of running text with the lines in it; `depth` is that of the first line."""
        start = rng.randrange(max(1, len(self.filler) - room))
        filler = np.take(self.filler, range(start, start + room), mode="wrap").tolist()
        last = room - self.clear
        at = [rng.randrange(last) for _ in lines]
        if depth is not None:
            at[0] = round(depth * (last - 1))
        for place, line in sorted(zip(at, lines, strict=True), reverse=True):
            filler[place:place] = line
        return filler

    def _chosen(self, keys: int, rng: random.Random, apart: bool) -> list[Wording]:
        """The wording of each needle: one for all, or all `apart`."""
        if not apart:
            return [rng.choice(self.wordings)] * keys
        if keys > len(self.wordings):
            raise ConfigError(
                f"{keys} needles cannot have a wording each: there are {len(self.wordings)}; ask for fewer"
            )
        return rng.sample(self.wordings, keys)

    def _value(self, rng: random.Random) -> str:
        """A number of as many tokens as every other one has."""
        for _ in range(_TRIES):
            value = "".join(rng.choices("0123456789", k=_DIGITS))
            if self._width(value) == self.width:
                return value
        raise ConfigError(
            f"this tokenizer hardly writes two numbers of {_DIGITS} digits alike, so needles cannot be "
            "written in its tokens; use a model whose tokenizer splits numbers"
        )

    def _width(self, value: str) -> int:
        ids = self._ids(f" {value}")
        # a space can be a token of its own
        return len(ids) - (not self.tokenizer.decode(ids[:1]).strip())

    def _names(self, count: int, rng: random.Random) -> list[str]:
        if self.names is not None:
            return rng.sample(list(self.names), count)
        found: dict[str, None] = {}
        while len(found) < count:
            found[word(rng, rng.choice((2, 3))).capitalize()] = None
        return list(found)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _turns(tokenizer: Any) -> tuple[str, str, str]:
    """What stands before a first message, between question and answer, and between answer and question."""
    if not getattr(tokenizer, "chat_template", None):
        return "", "\n", ".\n"
    marks = [f"<{i}-message-{i}>" for i in range(4)]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = []
    for mark in marks[:3]:
        before, found, text = text.partition(mark)
        if not found:
            raise ConfigError(
                "the chat template does not keep messages as they are, so needles cannot be written in "
                "it; use a model with a plainer template"
            )
        pieces.append(before)
    return pieces[0], pieces[1], pieces[2]


class NeedleWindows(Windows):
    """Windows of which a share are such chats, with the places of their answers marked.

    Names and numbers are drawn from (seed, step, process), so resuming is exact here too.
    """

    def __init__(self, windows: Windows, writer: NeedleWriter, share: float) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"the share of needles must be in 0..1, got {share}")
        super().__init__(windows.stream, windows.context, windows.seed, process=windows.process)
        self.writer, self.share = writer, share

    def batch(self, step: int, rows: int, context: int | None = None) -> torch.Tensor:
        """As `Windows.batch`; `share` of the rows ask, rounded up or down by chance."""
        batch = super().batch(step, rows, context)
        rng = random.Random(f"needles {self.seed} {step} {self.process}")
        for row in range(int(self.share * rows + rng.random())):
            keys = rng.randint(1, most_keys(batch.shape[1]))
            asked = rng.randint(1, keys)
            made = self.writer.batch(1, batch.shape[1], keys=keys, asked=asked, rng=rng)
            batch[row] = made.marked()[0]
        return batch
