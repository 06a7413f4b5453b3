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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from linspec.errors import ConfigError, NotFinite
from linspec.evaluate.perplexity import held_out_documents
from linspec.evaluate.recall import limits_of, readers, reads, stream_ids
from linspec.models.decoder import Decoder
from linspec.train.data import Sources, check_sources
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_lengths, check_size

PASSAGE = 128
# of a repeated passage, tokens that do not count: they are what tells that it is one
_OPENING = 8


@dataclass(frozen=True, slots=True)
class RepeatCell:
    """Nats for each token of a passage where it stands first and where it stands again.

    distance: tokens between the two. gain: their difference. right: share of the tokens that are the
    likeliest the second time. teacher_gain: the teacher's on the same texts; relative: gain over it. kept:
    of the tokens that the teacher has right, the share that the model has too. These three are None where
    there is no teacher or it cannot read the length.
    """

    length: int
    distance: int
    first: float
    again: float
    gain: float
    right: float
    teacher_gain: float | None = None
    relative: float | None = None
    kept: float | None = None


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
    attention: str | None = None,
    device: str = "cpu",
) -> Repeats:
    """What `model` gains on passages of `passage` tokens that are repeated at the end of a text.

    lengths: of whole texts, in tokens. attention: of `model`, as of LLM; the teacher reads everything.
    Lengths beyond the positions of a softmax model, or the held-out text, are left out. Raises ConfigError
    when a text has no room for a passage and its repetition, and what `attending` raises.
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
    model, teacher, tokenizer = readers(model, teacher, tokenizer, attention, device)
    stream = stream_ids(tokenizer, model, held_out_documents(data, field), max(lengths))
    limits = [*limits_of("model", model, lengths), *limits_of("teacher", teacher, lengths)]
    # a text that was repeated to be as long would hold the passage in between, too
    short = [length for length in lengths if length >= len(stream)]
    if short:
        limits.append(f"the held-out text has {len(stream)} tokens: no figure at {short}")
    readable = [n for n in dict.fromkeys(lengths) if reads(model, n) and n not in short]
    if not readable:
        raise ConfigError(f"no length can be measured: {'; '.join(limits)}")
    cells = []
    with Progress("repeats", len(readable)) as progress:
        for length in readable:
            texts = [
                _text(stream, length, passage, random.Random(f"repeat {i}")) for i in range(samples)
            ]
            cells.append(_cell(model, teacher, texts, passage))
            progress.update(len(cells), f"{length} tokens")
    return Repeats(tuple(cells), passage, samples, tuple(limits))


def _cell(
    model: Decoder, teacher: Decoder | None, texts: Sequence[list[int]], passage: int
) -> RepeatCell:
    length, read = len(texts[0]), _read(model, texts, passage)
    cell = RepeatCell(
        length=length,
        distance=length - passage,
        first=read.first,
        again=read.again,
        gain=read.gain,
        right=float(read.right.float().mean()),
    )
    if teacher is None or not reads(teacher, length):
        return cell
    wanted = _read(teacher, texts, passage)
    return replace(
        cell,
        teacher_gain=wanted.gain,
        relative=read.gain / wanted.gain if wanted.gain else None,
        kept=float(read.right[wanted.right].float().mean()) if wanted.right.any() else None,
    )


def _text(stream: Sequence[int], length: int, passage: int, rng: random.Random) -> list[int]:
    begin = rng.randrange(len(stream) - length)
    once = list(stream[begin : begin + length - passage])
    return once + once[:passage]


@dataclass(frozen=True, slots=True)
class _Read:
    """Mean nats of passages behind their openings, and which tokens are right again: [texts, tokens]."""

    first: float
    again: float
    right: torch.Tensor

    @property
    def gain(self) -> float:
        return self.first - self.again


@torch.inference_mode()
def _read(model: Decoder, texts: Sequence[list[int]], passage: int) -> _Read:
    device, totals, right = model.device, [0.0, 0.0], []
    for text in texts:
        ids = torch.tensor(text, device=device)
        states = model.hidden(ids[None, :-1])[0]
        for i, begin in enumerate((0, len(text) - passage)):
            at = slice(begin + _OPENING - 1, begin + passage - 1)
            wanted = ids[begin + _OPENING : begin + passage]
            logits = model.head(states[at]).float()
            totals[i] += float(F.cross_entropy(logits, wanted))
        right.append((logits.argmax(-1) == wanted).cpu())
    if not all(map(math.isfinite, totals)):
        raise NotFinite("the losses of the passages")
    return _Read(totals[0] / len(texts), totals[1] / len(texts), torch.stack(right))
