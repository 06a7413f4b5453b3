"""Linearize with exact heads: find them, then let what is left match the teacher.

    gates = find_heads(teacher, tokenizer, stream, GateConfig(counts=(22, 11)))
    student = exact_student(teacher, gates[11].heads)
    match_teacher(teacher, student, windows, config, folder)
    save_delta(student.config, factors(student), out, base="smollm2")

The heads that recall stay exact, the others see what is near and the first tokens. Queries and keys are the
teacher's for good (what is recalled hangs on them); values, outputs and the MLPs get low-rank changes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.mixers.exact_heads import Heads, by_head_mixers
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.train.data import Windows
from linspec.train.gates import GateConfig, Gates, gated_student, train_gates
from linspec.train.loop import TrainConfig, Trainer
from linspec.train.low_rank import add_low_rank
from linspec.train.match_teacher import KlLoss
from linspec.train.needles import WORDINGS, Needles, NeedleWindows, NeedleWriter, most_keys
from linspec.train.student import sharing

log = logging.getLogger(__name__)

# 10 MB in float16 for a model of 30 layers of 576 features
RANKS = {"v": 32, "o": 32, "gate": 16, "up": 16, "down": 16}
LENGTHS = (512, 1024, 2048, 4096)
_CONTEXT = 2048


def find_heads(
    teacher: Decoder,
    tokenizer: Any,
    stream: np.ndarray,
    config: GateConfig,
    *,
    lengths: Sequence[int] = LENGTHS,
    batch_tokens: int = 8192,
    streaming: MixerConfig | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = log.info,
    state: Path | None = None,
) -> dict[int, Gates]:
    """Gates for each of `config.counts`, trained on needles in running text of several lengths.

    state: see `train_gates`.
    """
    writer = NeedleWriter(tokenizer, stream, WORDINGS)

    def batch(step: int) -> Needles:
        rng = random.Random(f"gates {seed} {step}")
        length = lengths[step % len(lengths)]
        keys = rng.randint(1, most_keys(length))
        rows = max(1, batch_tokens // length)
        return writer.batch(rows, length, keys=keys, asked=keys, rng=rng)

    student = gated_student(teacher, streaming or make_mixer("streaming"))
    return train_gates(teacher, student, batch, config, tell, state)


def context_of(context: int | None, positions: int) -> int:
    """Tokens of the longest training text of a model of so many positions; None is 2,048, if it reads them.

    Raises ConfigError for more than it reads.
    """
    if context is None:
        return min(_CONTEXT, positions)
    if context > positions:
        raise ConfigError(
            f"a training context of {context} tokens is beyond the {positions} positions of this model; "
            "choose a shorter --context"
        )
    return context


def lengths_up_to(context: int) -> list[int]:
    """Tokens of the texts that gates are trained on, in turns."""
    return [length for length in LENGTHS if length <= context] or [context]


def exact_student(teacher: Decoder, heads: Heads, streaming: MixerConfig | None = None) -> Decoder:
    """The teacher's weights with `heads` exact and the others streaming, untrained."""
    mixers = by_head_mixers(teacher.config, streaming or make_mixer("streaming"), heads)
    return sharing(teacher, mixers)


def needle_windows(
    tokenizer: Any,
    stream: np.ndarray,
    context: int,
    share: float,
    *,
    filler: np.ndarray | None = None,
    seed: int = 0,
) -> Windows:
    """Windows of `stream`, of which `share` are chats that ask for what stood far above.

    filler: running text for these, where the stream has chats of its own.
    """
    text = stream if filler is None else filler
    windows = Windows(stream, context, seed)
    return NeedleWindows(windows, NeedleWriter(tokenizer, text, WORDINGS), share)


def match_teacher(
    teacher: Decoder,
    student: Decoder,
    windows: Windows,
    config: TrainConfig,
    folder: Path,
    *,
    rows: int,
    label: str,
    answers: float = 0.1,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Train the low-rank changes of `student`, made on the first call, by KL; returns the log."""
    if not any(weight.requires_grad for weight in student.parameters()):
        add_low_rank(student, RANKS, config.seed)
    loss = KlLoss(teacher, student, answers)
    trainer = Trainer(
        student, loss, lambda step: windows.batch(step, rows), config, folder, label=label
    )
    return trainer.run(resume=resume and trainer.has_state)
