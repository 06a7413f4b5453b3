"""What masked-diffusion decoders are measured on: a model, prompts, and how good answers are.

Tasks have one right answer, by a small model that is trained for them. Text continues held-out documents: how
far it agrees with static decoding, and how likely an autoregressive judge finds it.
"""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from linspec.checkpoints.hub import load_diffusion, load_model, load_tokenizer, save_model
from linspec.decoding.sampling import SamplingParams
from linspec.errors import InputError
from linspec.evaluate.parallel_forms import Digits, Numbers
from linspec.evaluate.parallel_models import train_task_model
from linspec.evaluate.parallel_tasks import TASKS, ask, one_step_ceiling
from linspec.evaluate.perplexity import held_out_documents
from linspec.models.masked_diffusion import MaskedDiffusion

# tokens of a prompt in words
_PROMPT = 96


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids of the model's own, and the text that they stand for."""

    ids: tuple[int, ...]
    text: str


class Work(ABC):
    """Prompts for one model.

    blocks: specs of blocks that are compared, that of the reference first. quality: which of the numbers of
    `judged` counts; falls: whether less of it is better.
    """

    name: str
    blocks: tuple[str, ...]
    quality: str
    falls: bool = False
    model: MaskedDiffusion
    tokenizer: Any
    prompts: list[list[int]]
    params: list[SamplingParams]

    @abstractmethod
    def judged(
        self, answers: Sequence[Answer], reference: Sequence[Answer] | None
    ) -> dict[str, float]:
        """How good answers are; reference: those of static decoding, None for another model's answers."""


class Tasks(Work):
    """Lines that are copied, reversed, sorted or changed at a place (ParallelBench)."""

    name, quality = "tasks", "right"
    blocks = ("fixed:none", "fixed:3")

    def __init__(self, folder: Path, count: int, steps: int, length: int = 6) -> None:
        names = [name for name in TASKS if one_step_ceiling(name, length) == 1]
        rng, form = random.Random(0), Numbers()
        turns = itertools.islice(itertools.cycle(names), count)
        self.questions = [ask(name, length, rng) for name in turns]
        self.model = kept_model(
            folder / f"task-model-{length}-{steps}",
            lambda: train_task_model(steps, tasks=names, lengths=(length,)),
        )
        self.tokenizer = Digits()
        self.prompts = [form.prompt(each) for each in self.questions]
        self.params = [SamplingParams(max_tokens=each.length) for each in self.questions]

    def judged(
        self, answers: Sequence[Answer], reference: Sequence[Answer] | None
    ) -> dict[str, float]:
        pairs = zip(self.questions, answers, strict=True)
        return {"right": _mean([question.right(found.ids) for question, found in pairs])}


def kept_model(place: Path, train: Callable[[], MaskedDiffusion]) -> MaskedDiffusion:
    """The model in a folder, trained first where there is none."""
    if not place.exists():
        trained = train()
        place.parent.mkdir(parents=True, exist_ok=True)
        save_model(trained, None, place)
    return load_diffusion(place)


class Text(Work):
    """Held-out documents of the standard library, continued."""

    name, quality = "text", "agreement"
    blocks = ("fixed", "fixed:8")

    def __init__(
        self, model: str, count: int, tokens: int, judge: str | None, given: int = _PROMPT
    ) -> None:
        """given: tokens of each prompt."""
        self.model, self.tokenizer = load_diffusion(model), load_tokenizer(model)
        self.prompts = _beginnings(self.tokenizer, count, given)
        self.texts = [self.tokenizer.decode(ids) for ids in self.prompts]
        self.params = [SamplingParams(max_tokens=tokens, ignore_eos=True)] * len(self.prompts)
        self._judge = None if judge is None else Judge(judge)
        if judge is not None:
            self.quality, self.falls = "bits_per_byte", True

    def judged(
        self, answers: Sequence[Answer], reference: Sequence[Answer] | None
    ) -> dict[str, float]:
        found = {}
        if reference is not None:
            found["agreement"] = _mean(
                [_agreement(*each) for each in zip(answers, reference, strict=True)]
            )
        if self._judge is not None:
            found["bits_per_byte"] = self._judge.bits(self.texts, [each.text for each in answers])
        return found


def _beginnings(tokenizer: Any, count: int, given: int) -> list[list[int]]:
    """What documents begin with, `given` tokens of each."""
    found = []
    for text in held_out_documents(["stdlib"]):
        ids = tokenizer(text[: 16 * given], add_special_tokens=False)["input_ids"]
        if len(ids) >= given:
            found.append(ids[:given])
        if len(found) == count:
            return found
    raise InputError(
        f"the standard library has {len(found)} held-out documents of {given} tokens; ask for no more"
    )


def _agreement(answer: Answer, reference: Answer) -> float:
    """Share of the tokens that are those of the reference, place by place."""
    pairs = zip(answer.ids, reference.ids, strict=False)
    return sum(a == b for a, b in pairs) / max(1, len(reference.ids))


class Judge:
    """An autoregressive model that says how likely texts are; what repeats itself is likely too."""

    def __init__(self, source: str) -> None:
        self._model, self._tokenizer = load_model(source), load_tokenizer(source)

    @torch.inference_mode()
    def bits(self, prompts: Sequence[str], texts: Sequence[str]) -> float:
        """Bits per byte of the texts, each behind its prompt."""
        nats = 0.0
        for prompt, text in zip(prompts, texts, strict=True):
            given, wanted = (
                self._tokenizer(each, add_special_tokens=False)["input_ids"]
                for each in (prompt, text)
            )
            if wanted:
                logits = self._model(torch.tensor([[*given, *wanted[:-1]]]))[0, len(given) - 1 :]
                nats += float(
                    F.cross_entropy(logits.float(), torch.tensor(wanted), reduction="sum")
                )
        return nats / math.log(2) / max(1, sum(len(text.encode()) for text in texts))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
