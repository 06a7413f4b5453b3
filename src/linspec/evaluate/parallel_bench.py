"""ParallelBench (arXiv 2510.04767): what a masked-diffusion decoder loses by deciding several tokens at once.

    found = parallel_bench(per_forward=(1, 2, 0), loops=("commit=threshold:0.9",))
    print([(cell.task, cell.decoder, cell.right, cell.perfect) for cell in found.cells])

Without a model, a small one is trained for the tasks. Beside its answers stand those of a perfect model
through the same decoder, and where a decoder has a fixed plan the exact share of them that are right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import load_diffusion, load_tokenizer
from linspec.decoding.sampling import SamplingParams
from linspec.evaluate.parallel_forms import Digits, Form, Names, Numbers
from linspec.evaluate.parallel_models import PerfectModel, train_task_model
from linspec.evaluate.parallel_tasks import (
    TASKS,
    Question,
    ask,
    ceiling,
    check_length,
    check_task,
    shares,
)
from linspec.llm import LLM
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size

# without a model: one of this name is trained
TINY = "tiny"
_BATCH = 16


@dataclass(frozen=True, slots=True)
class ParallelCell:
    """How a decoder does on a task.

    right: share of answers that are right; strict: of those that also have the form that was asked for, to
    the letter. perfect: the share of a perfect model through the same decoder; ceiling: what that is
    exactly, where the decoder has a fixed plan. Both None for models that write names. tokens_per_forward:
    of the answers.
    """

    task: str
    length: int
    decoder: str
    answers: int
    right: float
    strict: float
    perfect: float | None
    ceiling: float | None
    tokens_per_forward: float


@dataclass(frozen=True, slots=True)
class ParallelBench:
    """All cells; `by_decoder`: the mean share of right answers over tasks and lengths."""

    cells: tuple[ParallelCell, ...]
    by_decoder: dict[str, float]
    temperature: float
    samples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A way to decode: a loop spec, or so many tokens a forward from left to right (0: all at once)."""

    each: int | None = None
    spec: str = ""

    @property
    def name(self) -> str:
        if self.each is None:
            return self.spec
        return f"{self.each} a forward" if self.each else "all at once"

    def loop(self, length: int) -> str:
        """The spec of the loop for answers of `length` tokens."""
        if self.each is None:
            return f"masked-diffusion:{self.spec}" if self.spec else "masked-diffusion"
        steps = len(shares(length, self.each or length))
        return f"masked-diffusion:block=fixed:none,commit=static:steps={steps}+order=left"

    def ceiling(self, question: Question) -> float | None:
        """What a perfect model that draws its tokens gets right, where that can be counted."""
        if self.each is None:
            return None
        return ceiling(question.accepted, shares(question.length, self.each or question.length))


def parallel_bench(
    model: str | Path | MaskedDiffusion = TINY,
    *,
    per_forward: Sequence[int] = (1, 2, 0),
    loops: Sequence[str] = (),
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (3, 4, 6),
    samples: int = 100,
    seed: int = 0,
    temperature: float = 1.0,
    steps: int = 3000,
    device: str = "cpu",
) -> ParallelBench:
    """How many answers of a diffusion model are right, for each task, length and decoder.

    model: 'tiny' trains a small one, in `steps` steps; one that `train_task_model` made; or a directory of a
    text model, which is asked in words. per_forward: tokens that are decided at a time, 0 for all. loops:
    specs of policies, such as 'commit=threshold:0.9'. temperature: 1 draws tokens, as the theory has it; 0
    takes the likeliest, by which a model can never choose at random. Raises ConfigError for an unknown task,
    for sizes that cannot be, and what LLM raises.
    """
    decoders = _check(per_forward, loops, tasks, lengths, samples, seed)
    judge = _judge(model, seed, steps, device)
    cells = list[ParallelCell]()
    kinds = [(task, length) for task in tasks for length in lengths]
    with Progress("parallel-bench", len(kinds) * len(decoders)) as progress:
        for task, length in kinds:
            rng = random.Random(f"{seed} {task} {length}")
            questions = [ask(task, length, rng) for _ in range(samples)]
            for decoder in decoders:
                cells.append(judge.cell(decoder, questions, temperature, seed))
                progress.update(len(cells), f"{task}, {length} items, {decoder.name}")
    means = {each.name: _mean(cells, each.name) for each in decoders}
    return ParallelBench(tuple(cells), means, temperature, samples, seed)


def _check(
    per_forward: Sequence[int],
    loops: Sequence[str],
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
) -> list[Decoder]:
    for task in tasks:
        check_task(task)
    for length in lengths:
        check_length(length)
    for each in per_forward:
        check_size("per_forward", each, least=0)
    check_size("samples", samples)
    check_size("seed", seed, least=0)
    decoders = [*map(Decoder, per_forward), *(Decoder(spec=spec) for spec in loops)]
    for number, what in (
        (len(decoders), "decoders"),
        (len(tasks), "tasks"),
        (len(lengths), "lengths"),
    ):
        check_size(what, number)
    return decoders


def _mean(cells: Sequence[ParallelCell], decoder: str) -> float:
    found = [cell.right for cell in cells if cell.decoder == decoder]
    return sum(found) / len(found)


def _judge(model: str | Path | MaskedDiffusion, seed: int, steps: int, device: str) -> Judge:
    if isinstance(model, MaskedDiffusion):
        return Judge(model, Digits(), Numbers())
    if model == TINY:
        return Judge(train_task_model(steps, seed=seed), Digits(), Numbers())
    loaded, tokenizer = load_diffusion(model, device=device), load_tokenizer(model)
    return Judge(loaded, tokenizer, Names(tokenizer, seed))


@dataclass(frozen=True, slots=True)
class Judge:
    """Asks one model."""

    model: MaskedDiffusion
    tokenizer: Any
    form: Form

    def cell(
        self, decoder: Decoder, questions: Sequence[Question], temperature: float, seed: int
    ) -> ParallelCell:
        """The cell of these questions, which are of one task and length."""
        first, plain = questions[0], isinstance(self.form, Numbers)
        answers = list(self._answers(self.model, decoder, questions, temperature, seed))
        exact = [decoder.ceiling(each) for each in questions] if plain and temperature == 1 else []
        perfect = None
        if plain:
            ideal = self._answers(PerfectModel(questions), decoder, questions, temperature, seed)
            perfect = _share([right for right, _, _ in ideal])
        return ParallelCell(
            task=first.task,
            length=len(first.items),
            decoder=decoder.name,
            answers=len(answers),
            right=_share([right for right, _, _ in answers]),
            strict=_share([strict for _, strict, _ in answers]),
            perfect=perfect,
            ceiling=math.fsum(e for e in exact if e is not None) / len(exact)
            if _all(exact)
            else None,
            tokens_per_forward=_share([per for _, _, per in answers]),
        )

    def _answers(
        self,
        model: MaskedDiffusion,
        decoder: Decoder,
        questions: Sequence[Question],
        temperature: float,
        seed: int,
    ) -> Iterator[tuple[bool, bool, float]]:
        """Of each question whether the answer is right, whether also in form, and its tokens per forward."""
        masks = self.form.masks(questions[0])
        llm = LLM(
            model,
            tokenizer=self.tokenizer,
            loop=decoder.loop(masks),
            max_batch=_BATCH,
        )
        params = [
            SamplingParams(max_tokens=masks, temperature=temperature, seed=seed + at)
            for at in range(len(questions))
        ]
        prompts = [self.form.prompt(each) for each in questions]
        for question, found in zip(questions, llm.generate(prompts, params), strict=True):
            items = self.form.read(found)
            right = items is not None and question.right(items)
            strict = right and self.form.strict(found)
            yield right, strict, found.stats.tokens_per_round


def _share(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _all(values: Sequence[float | None]) -> bool:
    return bool(values) and None not in values
