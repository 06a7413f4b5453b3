"""The demo's two trainings, as long as this machine can do in the time there is."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from linspec.checkpoints.hub import load_config, load_model
from linspec.demo.budget import Budget, training_speed, training_tokens
from linspec.demo.work import Work, can_resume
from linspec.drafters.saved import CONFIG_FILE
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.train.drafters import DrafterConfig, train_drafter
from linspec.train.drafters.medusa import MedusaTraining, MedusaTrainingOptions
from linspec.train.drafters.states import states_of
from linspec.train.finetune import finetune_loss
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.linearize_record import RECORD
from linspec.train.student import spread, student_mixers, with_mixers

MIXER, STUDENT = "aug", "embedded-aug"


def swapped(teacher: Decoder) -> Decoder:
    """The teacher's weights with linear mixers, before any training."""
    mixer = make_mixer(MIXER)
    mixers = student_mixers(teacher.config, mixer, ())
    spans = _spans(teacher) or [mixer.span] * len(mixers)
    return with_mixers(teacher, spread(mixers, spans)).eval()


def _spans(teacher: Decoder) -> list[int] | None:
    """Those that the full recipe found for the embedded teacher; measuring takes half a minute."""
    spans = [mixer.span for mixer in load_config(STUDENT).mixers]
    return spans if len(spans) == teacher.config.layers else None


def make_student(
    work: Work,
    budget: Budget,
    source: str | Path,
    teacher: Decoder,
    data: Sequence[str | Path],
    seed: int,
) -> int:
    """Linearize into `work.student`, or go on with it; returns the tokens it is trained on."""
    context = min(budget.context, teacher.config.max_positions)
    tokens = work.recall("linearize_tokens")
    if tokens is None:
        tokens = training_tokens(
            budget.linearize, _linearize_speed(teacher, budget, context), budget
        )
        work.note("linearize_tokens", tokens)
    config = LinearizeConfig(
        tokens=tokens,
        context=context,
        batch_tokens=budget.batch_tokens,
        save_every=30.0,
        seed=seed,
    )
    resume = can_resume(work.student, RECORD)
    linearize(
        source,
        work.student,
        mixer=MIXER,
        span=_spans(teacher),
        data=data,
        config=config,
        resume=resume,
    )
    return int(tokens)


def _linearize_speed(teacher: Decoder, budget: Budget, context: int) -> float:
    student = swapped(teacher).train()
    loss = partial(finetune_loss, student, teacher=teacher, kl_weight=1.0)
    rows = max(1, budget.batch_tokens // context)
    return training_speed(loss, student.parameters(), teacher.config.vocab_size, rows, context)


def make_heads(work: Work, budget: Budget, data: Sequence[str | Path], seed: int) -> int:
    """Train Medusa heads into `work.student/medusa`, or go on; returns the tokens trained on."""
    tokens = work.recall("heads_tokens")
    if tokens is None:
        reserved = budget.evaluate + budget.generate + budget.speed + budget.other / 2
        left = budget.total - work.spent - reserved
        seconds = min(budget.heads, max(left, budget.heads / 4))
        tokens = training_tokens(seconds, _heads_speed(work.student, budget), budget)
        work.note("heads_tokens", tokens)
    config = DrafterConfig(
        tokens=tokens,
        context=budget.heads_context,
        batch_tokens=budget.heads_batch_tokens,
        calibration_tokens=budget.calibration_tokens,
        save_every=30.0,
        seed=seed,
    )
    resume = can_resume(work.student / "medusa", CONFIG_FILE)
    train_drafter(work.student, kind="medusa", data=data, config=config, resume=resume)
    return int(tokens)


def _heads_speed(student: Path, budget: Budget) -> float:
    target = load_model(student).requires_grad_(False)
    training, vocabulary = MedusaTraining(MedusaTrainingOptions()), target.config.vocab_size
    heads = training.make(target, np.empty(0, dtype=np.int64), 0)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return training.loss(heads, states_of(target, batch))

    rows = max(1, budget.heads_batch_tokens // budget.heads_context)
    return training_speed(loss, heads.parameters(), vocabulary, rows, budget.heads_context)


def training_log(student: Path) -> list[tuple[float, float]]:
    """(tokens, loss) of the student's finetuning, as linearize logged it."""
    try:
        lines = (student / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    entries = [json.loads(line) for line in lines]
    return [(e["tokens"], e["loss"]) for e in entries if e.get("stage") == "finetune"]


def shuffled(documents: Sequence[str], seed: int) -> list[str]:
    """The documents in a random order, the same for the same seed."""
    return random.Random(seed).sample(list(documents), len(documents))
