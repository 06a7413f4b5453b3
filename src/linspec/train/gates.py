"""Which KV heads must stay exact: gates between exact and streaming attention, trained jointly on recall.

    student = gated_student(teacher, make_mixer("streaming"))
    found = train_gates(teacher, student, batches, GateConfig(counts=(22, 11)))
    mixers = by_head_mixers(teacher.config, streaming, found[11].heads)

Each KV head gives g · exact + (1 - g) · streaming, all from the student's own stream. All gates start at 1
and are pulled down; the loss is how far the answers' digits are from the teacher's. Heads judged one at a
time mislead: most are redundant alone (DuoAttention, Xiao et al. 2024, arXiv 2410.10819, and what was
measured here). Gates that are trained for one budget rank badly for another, so the pull grows until the
mean gate is the share that was asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linspec.errors import ConfigError, TrainingError
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.exact_heads import Heads
from linspec.mixers.ops.exact import softmax_attention
from linspec.mixers.streaming import Streaming
from linspec.models.decoder import Decoder
from linspec.train.gate_state import GateState, adam_moments, read_gate_state, with_moments
from linspec.train.needles import Needles
from linspec.train.pieces import kl_of_states
from linspec.train.student import sharing
from linspec.utils.files import replace_text
from linspec.utils.progress import Progress

log = logging.getLogger(__name__)


class GatedHeads(Streaming):
    """g · softmax over all tokens + (1 - g) · streaming, one g for each KV head."""

    def __init__(self, config: StackConfig, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)
        self.gate = nn.Parameter(torch.ones(self.kv_heads))

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        near = super().mix(q, k, v, sums)
        # with heads repeated, kernels of every device and dtype take it without a [T, T] matrix
        k, v = (rows.repeat_interleave(self.repeats, dim=1) for rows in (k, v))
        exact = softmax_attention(
            q, k, v, scale=self.config.score_scale, cap=self.config.score_cap, causal=True
        )
        gate = self.gate.repeat_interleave(self.repeats)[:, None, None].to(near.dtype)
        return torch.lerp(near, exact, gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """How gates are trained.

    counts: KV heads that stay exact, for each of which gates are found, from the largest down. weight: of
    the mean gate beside the KL; held for `settle` steps, then multiplied by `growth` every `every` steps
    until the mean gate is the share wanted. steps, seconds: no more than these.
    """

    counts: tuple[int, ...]
    lr: float = 0.03
    weight: float = 0.5
    settle: int = 100
    every: int = 10
    growth: float = 1.25
    steps: int = 400
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.counts or list(self.counts) != sorted(set(self.counts), reverse=True):
            raise ConfigError(f"counts must fall, and be one or more, got {list(self.counts)}")


@dataclass(frozen=True, slots=True)
class Gates:
    """Gates [layers, KV heads], the heads that they choose, and how they came about."""

    values: list[list[float]]
    heads: Heads
    steps: int
    weight: float
    reached: bool

    @classmethod
    def of(cls, data: dict[str, Any]) -> Gates:
        """The inverse of `asdict`, as JSON has it."""
        heads = tuple(tuple(layer) for layer in data["heads"])
        return cls(**{**data, "heads": heads})


def gated_student(teacher: Decoder, streaming: MixerConfig) -> Decoder:
    """The teacher with gates, which are all that can be trained."""
    config = teacher.config
    if any(mixer.name != "softmax" or mixer.taps for mixer in config.mixers):
        raise ConfigError("gates need a model all of whose layers are plain softmax attention")
    student = sharing(teacher, (streaming,) * config.layers)
    for block in student.layers:
        gated = GatedHeads(config, streaming).to(teacher.embed.weight)
        gated.load_state_dict(block.mixer.state_dict(), strict=False, assign=True)
        for name, weight in gated.named_parameters():
            weight.requires_grad_(name == "gate")
        block.mixer = gated
    return student


def gates_of(student: Decoder) -> torch.Tensor:
    """The gates of all layers, [layers, KV heads], with their gradient."""
    return torch.stack([block.mixer.get_parameter("gate") for block in student.layers])


def top_heads(gates: torch.Tensor, count: int) -> Heads:
    """The `count` KV heads with the largest gates, layer by layer."""
    if not 0 < count <= gates.numel():
        raise ConfigError(f"exact heads must be 1 to {gates.numel()} of this model, got {count}")
    # stable: equal gates are taken from the first layer on
    order = gates.flatten().argsort(descending=True, stable=True)[:count].tolist()
    width = gates.shape[1]
    return tuple(
        tuple(sorted(place % width for place in order if place // width == layer))
        for layer in range(len(gates))
    )


def train_gates(
    teacher: Decoder,
    student: Decoder,
    batch_fn: Callable[[int], Needles],
    config: GateConfig,
    tell: Callable[[str], None] = log.info,
    state: Path | None = None,
) -> dict[int, Gates]:
    """Gates for each of the counts; `student` is what `gated_student` made of `teacher`.

    Where steps or seconds run out, what is left gets the gates as they are, and says so. state: a file that
    each step is kept in; if it is there, the training goes on from it and ends as if it had not stopped.
    """
    training = _Training(teacher, student, config)
    if state is not None and state.exists():
        training.restore(read_gate_state(state, gates_of(student).shape))
    with Progress("gates", config.steps, training.steps) as progress:
        while training.wanted:
            if training.steps >= config.steps or training.late():
                training.give_up()
                break
            value = training.step(batch_fn(training.steps))
            told = f"KL {value:.3f}, mean gate {training.mean():.3f}, weight {training.weight:.2f}"
            progress.update(training.steps, told)
            if training.steps == 1 or training.steps % config.every == 0:
                tell(f"gates: step {training.steps}, {told}, {training.spent():.0f} s")
            if training.steps >= config.settle and training.steps % config.every == 0:
                training.consider()
            if state is not None:
                replace_text(state, training.kept().to_text())
    return training.found


@dataclass
class _Training:
    teacher: Decoder
    student: Decoder
    config: GateConfig
    found: dict[int, Gates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gates = [block.mixer.get_parameter("gate") for block in self.student.layers]
        self.optimizer = torch.optim.Adam(self.gates, lr=self.config.lr)
        self.weight, self.steps = self.config.weight, 0
        self.wanted, self.began = list(self.config.counts), time.monotonic()
        # of a process that was stopped
        self.before = 0.0
        self.device = self.student.embed.weight.device
        self.seen = torch.zeros_like(gates_of(self.student).detach())

    def spent(self) -> float:
        return self.before + time.monotonic() - self.began

    def late(self) -> bool:
        return self.config.seconds is not None and self.spent() > self.config.seconds

    def mean(self) -> float:
        return float(gates_of(self.student).detach().mean())

    def step(self, needles: Needles) -> float:
        """One step; returns the KL of the digits."""
        tokens, places = needles.tokens.to(self.device), needles.places.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            with torch.no_grad():
                wanted = _before(self.teacher.hidden(tokens), places)
            given = _before(self.student.hidden(tokens), places)
            loss = kl_of_states(given, wanted, self.student.head, self.teacher.head)
            pull = self.weight * gates_of(self.student).mean()
        if not bool((loss + pull).isfinite()):
            raise TrainingError(
                f"gates: the loss became {float(loss.detach())}; lower their learning rate"
            )
        (loss + pull).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for gate in self.gates:
                gate.clamp_(0, 1)
            self.seen += gates_of(self.student)
        self.steps += 1
        return float(loss.detach())

    def consider(self) -> None:
        """Take the gates for every count whose share they have come down to; else pull harder."""
        total = sum(gate.numel() for gate in self.gates)
        while self.wanted and self.mean() <= self.wanted[0] / total:
            self._take(self.wanted.pop(0), reached=True)
        if self.wanted:
            self.weight *= self.config.growth

    def kept(self) -> GateState:
        """All that the next step hangs on."""
        values, seen = (
            x.detach().float().cpu().tolist() for x in (gates_of(self.student), self.seen)
        )
        return GateState(
            steps=self.steps,
            weight=self.weight,
            seconds=self.spent(),
            gates=values,
            seen=seen,
            moments=adam_moments(self.optimizer, self.gates),
            found={str(count): asdict(gates) for count, gates in self.found.items()},
        )

    def restore(self, kept: GateState) -> None:
        """Go on from what `kept` gave."""
        self.steps, self.weight, self.before = kept.steps, kept.weight, kept.seconds
        with torch.no_grad():
            for gate, row in zip(self.gates, kept.gates, strict=True):
                gate.copy_(torch.tensor(row))
            self.seen.copy_(torch.tensor(kept.seen))
        with_moments(self.optimizer, self.gates, kept.moments, kept.steps)
        self.found = {int(count): Gates.of(each) for count, each in kept.found.items()}
        self.wanted = [count for count in self.config.counts if count not in self.found]

    def give_up(self) -> None:
        while self.wanted:
            self._take(self.wanted.pop(0), reached=False)

    def _take(self, count: int, *, reached: bool) -> None:
        values = gates_of(self.student).detach().float().cpu()
        rows = [[round(float(value), 4) for value in row] for row in values]
        # of equal gates, those that stood open longer
        heads = top_heads(values + 1e-3 * (self.seen / max(1, self.steps)).float().cpu(), count)
        self.found[count] = Gates(rows, heads, self.steps, self.weight, reached)


def _before(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """States [B * A, D] that predict the tokens at `places` [B, A]."""
    at = (places - 1)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, at).flatten(0, 1)
