"""Recall: can a model repeat, far below, what the text said once?

    report = evaluate_recall("student", teacher="embedded-softmax", lengths=(512, 1024, 2048))
    for cell in report.cells:
        print(cell.task, cell.length, cell.distance, cell.exact, cell.relative)

Two tasks in text of the model's own kind. *needle*: a line gives a new name a random number of
several tokens. *pairs* (associative recall, Arora et al. 2023, arXiv 2312.04927): lines that give
several new names a new word each, of which one is asked for. The same line stands again at the end
of the text, and the model has to continue it behind the name. A loss hides this: few tokens of a
text hang on what stood far above, and they are where a bounded state fails.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from linspec.checkpoints.attention import attending
from linspec.checkpoints.hub import check_tokenizer, load_any_config, load_model, with_tokenizer
from linspec.checkpoints.same_tokenizer import check_same_text
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.errors import ConfigError, InputError, NotFinite
from linspec.evaluate.perplexity import held_out_documents
from linspec.models.decoder import Decoder
from linspec.models.model_types import of_config
from linspec.train.data import Sources, check_sources, end_of_text
from linspec.train.recall_texts import TASKS, LineWriter, Task, cue_for
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_lengths, check_size

LENGTHS = (512, 1024, 2048, 4096)
# 3/4 of each length and of half the shortest: every length has a farthest place, with room for lines
DISTANCES = (192, 384, 768, 1536, 3072)

_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Question:
    """One text with places where a repeated answer must be predicted.

    answers: (distance, first position of the answer in `ids`, one past its last).
    """

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class RecallCell:
    """Recall of one task in texts of `length` tokens, the answer `distance` tokens above.

    exact: share of answers with every token the likeliest one, given those before it. tokens: the
    same for single tokens. probability: of an answer's token, geometric mean. relative: `tokens`
    over the teacher's. kept: of the answers that the teacher has right, the share that the model has too.
    Both None where there is no teacher, it cannot read the length, or recalls nothing.
    """

    task: str
    length: int
    distance: int
    answers: int
    exact: float
    tokens: float
    probability: float
    teacher_tokens: float | None = None
    relative: float | None = None
    kept: float | None = None


@dataclass(frozen=True, slots=True)
class Recall:
    """All cells, the means over them, and the lengths that a model could not read.

    relative: over the cells that the teacher can read, the sum of `tokens` over the teacher's.
    """

    cells: tuple[RecallCell, ...]
    exact: float
    tokens: float
    relative: float | None
    seeds: int
    samples: int
    limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def evaluate_recall(
    model: str | Path | Decoder,
    *,
    teacher: str | Path | Decoder | None = None,
    tokenizer: Any = None,
    data: Sources = ("stdlib",),
    field: str = "text",
    texts: Sequence[str] = (),
    lengths: Sequence[int] = LENGTHS,
    distances: Sequence[int] = DISTANCES,
    samples: int = 16,
    seeds: int = 1,
    attention: str | None = None,
    device: str = "cpu",
) -> Recall:
    """Recall of `model`, beside that of `teacher` on the very same texts.

    data: held-out text between definitions and questions; lines are code for 'stdlib', prose
    otherwise. texts: the part of it to take; if empty, what `held_out_documents` gives. lengths: of
    whole texts, in tokens; distances that do not fit a length are left out. samples: texts per task,
    length and seed. attention: of `model`, as of LLM; the teacher reads everything. Lengths beyond the
    positions of a softmax model are left out for it and named in `limits`. Raises ConfigError for sizes
    that cannot be built, and what `attending` raises.
    """
    _check(lengths, samples, seeds)
    check_lengths("distances", distances)
    data = check_sources(data)
    model, teacher, tokenizer = readers(model, teacher, tokenizer, attention, device)
    documents = texts or held_out_documents(data, field)
    filler = filler_ids(tokenizer, model, documents, max(lengths))
    write = Writer(tokenizer, filler, cue_for(data))
    cells: list[RecallCell] = []
    limits = [*limits_of("model", model, lengths), *limits_of("teacher", teacher, lengths)]
    readable = [length for length in dict.fromkeys(lengths) if reads(model, length)]
    kinds = [(length, task) for length in readable for task in TASKS]
    for length, task in kinds:
        # whether a text of each has room, before any is measured
        write(task, length, distances, random.Random(0))
    with Progress("recall", len(kinds)) as progress:
        for done, (length, task) in enumerate(kinds, 1):
            questions = [
                write(task, length, distances, random.Random(f"{seed} {task.name} {i}"))
                for seed in range(seeds)
                for i in range(samples)
            ]
            cells += _cells(task.name, length, questions, model, teacher)
            progress.update(done, f"{task.name} at {length} tokens")
    return _summary(cells, seeds, samples, limits)


def _check(lengths: Sequence[int], samples: int, seeds: int) -> None:
    check_lengths("lengths", lengths)
    check_size("samples", samples)
    check_size("seeds", seeds)


def readers(
    model: str | Path | Decoder,
    teacher: str | Path | Decoder | None,
    tokenizer: Any,
    attention: str | None,
    device: str,
) -> tuple[Decoder, Decoder | None, Any]:
    """A decoder that attends as `attention` says, what it is compared with, and the tokenizer of both.

    Raises ConfigError for a teacher that numbers text otherwise, and for what does not continue a text.
    """
    for each in (model, teacher):
        _check_continues(each)
    decoder, tokenizer = with_tokenizer(model, tokenizer, device=device)
    if teacher is not None and not isinstance(teacher, Decoder):
        check_same_text(tokenizer, load_text_tokenizer(teacher), str(teacher))
        teacher = load_model(teacher, device=device)
    if teacher is not None:
        check_tokenizer(tokenizer, teacher.config)
    return attending(decoder, attention, model), teacher, tokenizer


def _check_continues(source: object) -> None:
    """Raise ConfigError for the name or path of a model that continues no text."""
    if not isinstance(source, str | Path):
        return
    kind = of_config(load_any_config(source))
    if kind.model is not Decoder:
        way = f"; `{kind.measure}` measures it" if kind.measure else ""
        raise ConfigError(
            f"{source} is a model of type {kind.name!r}, and this is asked of models that continue a text, "
            f"token by token{way}"
        )


def reads(model: Decoder | None, length: int) -> bool:
    """Whether there is a model and it has the positions for texts of this length."""
    limit = None if model is None else model.config.position_limit
    return model is not None and (limit is None or length <= limit)


def limits_of(role: str, model: Decoder | None, lengths: Iterable[int]) -> list[str]:
    """Which of the lengths a model cannot read, as a sentence or none."""
    left_out = [length for length in lengths if model is not None and not reads(model, length)]
    if not left_out or model is None:
        return []
    return [f"the {role} ends at {model.config.position_limit} positions: no figure at {left_out}"]


def filler_ids(tokenizer: Any, model: Decoder, documents: Sequence[str], length: int) -> list[int]:
    """Held-out text as one stream, at least twice `length` long, so that cuts differ; repeated if short."""
    ids = stream_ids(tokenizer, model, documents, length)
    return ids * (2 * length // len(ids) + 1)


def stream_ids(tokenizer: Any, model: Decoder, documents: Sequence[str], length: int) -> list[int]:
    """Held-out text as one stream, no longer than many cuts of `length` need."""
    end, ids = end_of_text(tokenizer, model.config), list[int]()
    for text in documents:
        if len(ids) > 64 * length:
            break
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end]
    if not ids:
        raise InputError("there is no text to hide an answer in")
    return ids


class Writer(LineWriter):
    """Writes questions: definitions hidden in filler, asked again at the end of the text."""

    def __init__(self, tokenizer: Any, filler: Sequence[int], cue: str) -> None:
        super().__init__(tokenizer, cue)
        self.filler = filler

    def __call__(
        self, task: Task, length: int, distances: Sequence[int], rng: random.Random
    ) -> Question:
        """A text of `length` tokens that asks once at each of the `distances` that fit.

        The farthest is asked first. Raises ConfigError when definitions would overlap.
        """
        chosen = sorted((d for d in set(distances) if d <= length * 3 // 4), reverse=True)
        if not chosen:
            raise ConfigError(
                f"none of the distances {list(distances)} fits {length} tokens; give lengths of "
                f"{min(distances) * 4 // 3 + 1} or more"
            )
        blocks = [[self.line(task, rng) for _ in range(task.pairs)] for _ in chosen]
        asked = [rng.randrange(task.pairs) for _ in chosen]
        questions = [block[i] for block, i in zip(blocks, asked, strict=True)]
        position = length - sum(len(cue) + len(answer) for cue, answer in questions)
        pieces: list[tuple[int, list[int]]] = []
        answers = []
        for distance, block, i in zip(chosen, blocks, asked, strict=True):
            cue, answer = block[i]
            begin = position + len(cue)
            answers.append((distance, begin, begin + len(answer)))
            before = sum(len(c) + len(a) for c, a in block[:i]) + len(cue)
            pieces.append((begin - distance - before, [t for c, a in block for t in (*c, *a)]))
            position = begin + len(answer)
        tail = [t for cue, answer in questions for t in (*cue, *answer)]
        pieces.append((length - len(tail), tail))
        return Question(self._fill(pieces, length, rng), tuple(answers))

    def _fill(
        self, pieces: Sequence[tuple[int, list[int]]], length: int, rng: random.Random
    ) -> tuple[int, ...]:
        ends = [0, *(at + len(ids) for at, ids in pieces)]
        gaps = [at - end for (at, _), end in zip(pieces, ends, strict=False)]
        if min(gaps) < 0:
            places = [(at, at + len(ids)) for at, ids in pieces]
            raise ConfigError(
                f"definitions do not fit {length} tokens: they would stand at {places}; give "
                "distances that lie farther apart, or longer texts"
            )
        begin = rng.randrange(len(self.filler) - length)
        out: list[int] = []
        for (_, ids), gap in zip(pieces, gaps, strict=True):
            out += [*self.filler[begin : begin + gap], *ids]
            begin += gap
        return tuple(out)


def _cells(
    task: str, length: int, texts: Sequence[Question], model: Decoder, teacher: Decoder | None
) -> list[RecallCell]:
    found = _answers(model, texts)
    beside = _answers(teacher, texts) if teacher is not None and reads(teacher, length) else {}
    cells = []
    for distance in sorted(found):
        hits, tokens, logs = zip(*found[distance], strict=True)
        share = sum(tokens) / len(tokens)
        against = beside.get(distance)
        wanted = sum(part for _, part, _ in against) / len(against) if against else None
        known = [hit for hit, (right, _, _) in zip(hits, against or (), strict=False) if right]
        cells.append(
            RecallCell(
                task=task,
                length=length,
                distance=distance,
                answers=len(hits),
                exact=sum(hits) / len(hits),
                tokens=share,
                probability=float(torch.tensor(logs).mean().exp()),
                teacher_tokens=wanted,
                relative=share / wanted if wanted else None,
                kept=sum(known) / len(known) if known else None,
            )
        )
    return cells


@torch.inference_mode()
def _answers(
    model: Decoder, texts: Sequence[Question]
) -> dict[int, list[tuple[bool, float, float]]]:
    """By distance: whether all of an answer is right, the share of it, its mean log-probability."""
    device = model.device
    rows = max(1, _BATCH_TOKENS // len(texts[0].ids))
    found: dict[int, list[tuple[bool, float, float]]] = {}
    for first in range(0, len(texts), rows):
        batch = texts[first : first + rows]
        hidden = model.hidden(torch.tensor([text.ids for text in batch], device=device))
        for text, states in zip(batch, hidden, strict=True):
            for distance, begin, end in text.answers:
                logs = model.head(states[begin - 1 : end - 1]).float().log_softmax(-1)
                wanted = torch.tensor(text.ids[begin:end], device=device)
                right = logs.argmax(-1) == wanted
                mean = float(logs.gather(1, wanted[:, None]).mean())
                if math.isnan(mean):
                    raise NotFinite("the scores of the answers")
                result = (bool(right.all()), float(right.float().mean()), mean)
                found.setdefault(distance, []).append(result)
    return found


def _summary(
    cells: Sequence[RecallCell], seeds: int, samples: int, limits: Sequence[str]
) -> Recall:
    if not cells:
        raise ConfigError(f"no length can be measured: {'; '.join(limits)}")
    both = [cell for cell in cells if cell.teacher_tokens is not None]
    wanted = sum(cell.teacher_tokens or 0.0 for cell in both)
    return Recall(
        cells=tuple(cells),
        exact=sum(cell.exact for cell in cells) / len(cells),
        tokens=sum(cell.tokens for cell in cells) / len(cells),
        relative=sum(cell.tokens for cell in both) / wanted if wanted else None,
        seeds=seeds,
        samples=samples,
        limits=tuple(limits),
    )
