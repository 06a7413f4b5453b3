"""How long each part of the demo may take; the only place with its sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from linspec.train.precision import fast_bfloat16

Clock = Callable[[], float]

_PROBE_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Seconds of every part, and the sizes that fit into them on two slow cores.

    total: of everything behind act one, which takes `real`; `other` is what loading, tokenizing and
    drawing take of it. The token counts of training follow from the speed of the first steps, within
    `least` and `most`.
    eval_piece: characters of one file that are evaluated. eval_bytes, prompts, new_tokens and
    contexts are upper bounds: a slow machine does fewer.
    """

    total: float
    real: float
    linearize: float
    heads: float
    evaluate: float
    generate: float
    speed: float
    other: float
    context: int = 1024
    batch_tokens: int = 4096
    heads_context: int = 256
    heads_batch_tokens: int = 2048
    least: int = 8_192
    most: int = 2_000_000
    calibration_tokens: int = 16_384
    eval_bytes: int = 200_000
    eval_piece: int = 8_000
    prompts: int = 8
    prompt_tokens: int = 192
    new_tokens: int = 128
    shown_tokens: int = 160
    shown_nodes: int = 12
    shown_rounds: int = 4
    contexts: tuple[int, ...] = (256, 960, 4096, 8192)
    answer_tokens: int = 96
    real_contexts: tuple[int, ...] = (128, 1024, 4096)
    speed_tokens: int = 48
    speed_repeats: int = 3


FULL = Budget(
    total=275,
    real=70,
    linearize=115,
    heads=45,
    evaluate=20,
    generate=35,
    speed=30,
    other=30,
)
QUICK = Budget(
    total=80,
    real=25,
    linearize=26,
    heads=13,
    evaluate=7,
    generate=11,
    speed=8,
    other=18,
    context=1024,
    batch_tokens=2048,
    calibration_tokens=8_192,
    eval_bytes=60_000,
    prompts=4,
    new_tokens=64,
    shown_tokens=96,
    shown_rounds=3,
    answer_tokens=48,
    real_contexts=(128, 1024),
    contexts=(256, 960, 4096),
    speed_tokens=24,
    speed_repeats=1,
)


def training_tokens(seconds: float, tokens_per_s: float, budget: Budget) -> int:
    """Tokens that fit into `seconds` at the measured speed, within the budget's bounds."""
    return max(budget.least, min(budget.most, int(seconds * tokens_per_s)))


def training_speed(
    loss: Callable[[torch.Tensor], torch.Tensor],
    weights: Iterable[nn.Parameter],
    vocab_size: int,
    rows: int,
    context: int,
    clock: Clock = time.perf_counter,
) -> float:
    """Tokens per second of a few steps, which leave the weights as they are; the first warms up."""
    weights = list(weights)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(vocab_size, (rows, context + 1), generator=generator)
    bfloat16 = fast_bfloat16(batch.device)
    times = []
    for _ in range(_PROBE_STEPS):
        began = clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(batch)
        torch.autograd.backward(value)
        times.append(clock() - began)
        for weight in weights:
            weight.grad = None
    return rows * context / max(statistics.mean(times[1:]), 1e-9)
