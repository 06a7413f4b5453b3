"""Texts that ask for what stood far above: what teaches a model recall, and what measures it.

A *line* gives a new random name a random answer; the same line stands again further down, where the
answer can only come from above (associative recall, Arora et al. 2023, arXiv 2312.04927). Evaluation
asks at exact distances (`linspec.evaluate.recall`); training asks anywhere, and repeats whole passages
too, so that a model learns to look things up rather than where they stand.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from linspec.errors import ConfigError
from linspec.train.data import Windows

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
# tokens of running text between two lines, at most; and the length of a repeated passage
_GAP, _PASSAGE = 48, (16, 128)
# how often a place repeats a passage, and how often one of the known lines
_REPEATS, _ASKS = 0.15, 0.5


def word(rng: random.Random, syllables: int) -> str:
    """A word that no text has, such as 'bakedu'."""
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))


@dataclass(frozen=True, slots=True)
class Task:
    """What a definition looks like: `pairs` lines, each a cue and, right behind it, its answer.

    A line is written as its format says for a (name, answer): the cue of code is an assignment, the
    cue of prose a sentence.
    """

    name: str
    pairs: int
    answer: Callable[[random.Random], str]


TASKS = (
    Task("needle", 1, lambda rng: str(rng.randrange(100_000, 1_000_000))),
    Task("pairs", 4, lambda rng: f"{word(rng, 3)}"),
)
# the line break comes first: a cue begins a line wherever the filler was cut
CUES = {"code": "\n    self.{name} =", "prose": "\nThe {name} is"}


def cue_for(data: Sequence[object]) -> str:
    """The cue that fits a text: lines of code for 'stdlib', prose otherwise."""
    return CUES["code" if [str(d) for d in data] == ["stdlib"] else "prose"]


class LineWriter:
    """Writes lines in the tokens of one model."""

    def __init__(self, tokenizer: Any, cue: str) -> None:
        self.tokenizer, self.cue = tokenizer, cue

    def line(self, task: Task, rng: random.Random) -> tuple[list[int], list[int]]:
        """Tokens of a cue and of its answer; in one piece they would not always be the same."""
        cue = self.cue.format(name=f"{word(rng, 2)}_{word(rng, 2)}")
        return self._ids(cue), self._ids(f" {task.answer(rng)}")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class RecallWindows(Windows):
    """Windows of which a share are texts that ask for what stood above, between running text.

    Names and answers are new in every window and drawn from (seed, step, process), so resuming is
    exact here too.
    """

    def __init__(self, windows: Windows, lines: LineWriter, share: float) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"recall_share must be in 0..1, got {share}")
        super().__init__(windows.stream, windows.context, windows.seed, process=windows.process)
        self.lines, self.share = lines, share

    def batch(self, step: int, rows: int, context: int | None = None) -> torch.Tensor:
        """As `Windows.batch`; `share` of the rows ask, rounded up or down by chance."""
        batch = super().batch(step, rows, context)
        rng = random.Random(f"recall {self.seed} {step} {self.process}")
        for row in range(int(self.share * rows + rng.random())):
            batch[row] = torch.tensor(self._text(batch.shape[1], rng))
        return batch

    def _text(self, length: int, rng: random.Random) -> list[int]:
        out: list[int] = []
        known: list[list[int]] = []
        at = rng.randrange(len(self.stream))
        while len(out) < length:
            gap = rng.randrange(_GAP)
            out += np.take(self.stream, range(at, at + gap), mode="wrap").tolist()
            at += gap
            out += self._piece(out, known, rng)
        return out[:length]

    def _piece(self, above: list[int], known: list[list[int]], rng: random.Random) -> list[int]:
        """A passage from above, a known line, or a new one, which is then known."""
        kind, size = rng.random(), rng.randint(*_PASSAGE)
        if kind < _REPEATS and len(above) > size:
            begin = rng.randrange(len(above) - size)
            return above[begin : begin + size]
        if kind < _REPEATS + _ASKS and known:
            return rng.choice(known)
        cue, answer = self.lines.line(rng.choice(TASKS), rng)
        known.append(cue + answer)
        return known[-1]


def with_recall(windows: Windows, tokenizer: Any, data: Sequence[object], share: float) -> Windows:
    """`windows` of `data`, of which `share` ask for what stood above."""
    if not share:
        return windows
    return RecallWindows(windows, LineWriter(tokenizer, cue_for(data)), share)
