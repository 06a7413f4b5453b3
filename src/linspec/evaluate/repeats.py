"""Repeats: how much cheaper is a passage the second time, thousands of tokens further down?

    report = evaluate_repeats("student", teacher="teacher", lengths=(2048, 4096))
    print([cell.relative for cell in report.cells])

Nothing is made up here: a passage of held-out text stands at the beginning of a longer held-out text and
again at its end. What a model gains on it, in nats, is what it remembers of it word for word.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from linspec.checkpoints.hub import load_model, with_tokenizer
from linspec.errors import ConfigError, NotFinite
from linspec.evaluate.perplexity import held_out_documents
from linspec.evaluate.recall import filler_ids, limits_of, reads
from linspec.models.decoder import Decoder
from linspec.train.data import Sources, check_sources
from linspec.utils.sizes import check_lengths, check_size

PASSAGE = 128
# of a repeated passage, tokens that do not count: they are what tells that it is one
_OPENING = 8


@dataclass(frozen=True, slots=True)
class RepeatCell:
    """Nats for each token of a passage where it stands first and where it stands again.

    distance: tokens between the two. gain: their difference. teacher_gain: the teacher's on the same
    texts; relative: gain over it. Both None where there is no teacher or it cannot read the length.
    """

    length: int
    distance: int
    first: float
    again: float
    gain: float
    teacher_gain: float | None = None
    relative: float | None = None


@dataclass(frozen=True, slots=True)
class Repeats:
    """A cell for each length, and the lengths that a model could not read."""

    cells: tuple[RepeatCell, ...]
    passage: int
    samples: int
    limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def evaluate_repeats(
    model: str | Path | Decoder,
    *,
    teacher: str | Path | Decoder | None = None,
    tokenizer: Any = None,
    data: Sources = ("stdlib",),
    field: str = "text",
    lengths: Sequence[int] = (1024, 2048, 4096),
    passage: int = PASSAGE,
    samples: int = 8,
    device: str = "cpu",
) -> Repeats:
    """What `model` gains on passages of `passage` tokens that are repeated at the end of a text.

    lengths: of whole texts, in tokens. Lengths beyond the positions of a softmax model are left out
    for it. Raises ConfigError when a text has no room for a passage and its repetition.
    """
    check_lengths("lengths", lengths)
    check_size("passage", passage)
    check_size("samples", samples)
    if min(lengths, default=0) < 2 * passage or passage <= _OPENING or samples < 1:
        raise ConfigError(
            f"texts of {list(lengths)} tokens must hold a passage twice, which has more than "
            f"{_OPENING} tokens, and samples must be 1 or more; got {passage} and {samples}"
        )
    data = check_sources(data)
    model, tokenizer = with_tokenizer(model, tokenizer, device=device)
    if teacher is not None and not isinstance(teacher, Decoder):
        teacher = load_model(teacher, device=device)
    stream = filler_ids(tokenizer, model, held_out_documents(data, field), max(lengths))
    limits = [*limits_of("model", model, lengths), *limits_of("teacher", teacher, lengths)]
    cells = []
    for length in lengths:
        if not reads(model, length):
            continue
        texts = [
            _text(stream, length, passage, random.Random(f"repeat {i}")) for i in range(samples)
        ]
        first, again = _nats(model, texts, passage)
        wanted = None
        if teacher is not None and reads(teacher, length):
            before, after = _nats(teacher, texts, passage)
            wanted = before - after
        gain = first - again
        relative = gain / wanted if wanted else None
        cells.append(RepeatCell(length, length - passage, first, again, gain, wanted, relative))
    if not cells:
        raise ConfigError(f"no length can be measured: {'; '.join(limits)}")
    return Repeats(tuple(cells), passage, samples, tuple(limits))


def _text(stream: Sequence[int], length: int, passage: int, rng: random.Random) -> list[int]:
    begin = rng.randrange(len(stream) - length)
    once = list(stream[begin : begin + length - passage])
    return once + once[:passage]


@torch.inference_mode()
def _nats(model: Decoder, texts: Sequence[list[int]], passage: int) -> tuple[float, float]:
    """Mean nats of the tokens of the passage behind its opening, the first time and again."""
    device, totals = model.device, [0.0, 0.0]
    for text in texts:
        ids = torch.tensor(text, device=device)
        states = model.hidden(ids[None, :-1])[0]
        for i, begin in enumerate((0, len(text) - passage)):
            at = slice(begin + _OPENING - 1, begin + passage - 1)
            wanted = ids[begin + _OPENING : begin + passage]
            totals[i] += float(F.cross_entropy(model.head(states[at]).float(), wanted))
    if not all(map(math.isfinite, totals)):
        raise NotFinite("the losses of the passages")
    return totals[0] / len(texts), totals[1] / len(texts)
