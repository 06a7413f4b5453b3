"""The training loop that pretraining, linearization and drafter training share.

Batches are a function of (seed, step), so a run that is killed and resumed sees exactly the data it
would have seen. The state of a run lives in one folder (`out/training/` for a run of one stage):
one safetensors file with the trained weights and the optimizers' moments, one JSON file with the
step, replaced as a whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from linspec.errors import CheckpointError, TrainingError
from linspec.train.compiled import CompiledLoss, LossFn, check_choice, has_compiler
from linspec.train.precision import check_precision, computed_in
from linspec.train.prefetch import Prefetch
from linspec.train.run import make_accelerator
from linspec.train.saved_state import read_state
from linspec.utils.files import replace_dir
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size

log = logging.getLogger(__name__)

# Steps run before deciding on compilation; the last of them is timed.
_PROBE_STEPS = 3
# Compiling costs about 20 s and makes a step 1.4 times as fast: it must save more than it costs.
_COMPILE_PAYS_AFTER = 150.0

BatchFn = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train.

    steps: optimizer steps. warmup: steps of linear rise. decay: share of the steps, at the end,
    over which the learning rate falls linearly to zero. save_every: seconds between checkpoints.
    muon_lr: when set, 2-D weights of the blocks use Muon with this rate, the rest AdamW with `lr`.
    lr_factors: (end of a weight's name, factor on `lr`) pairs; such weights never use Muon.
    seconds: train no longer than this; the learning rate then falls with the time, if that is first.
    precision: 'auto' computes in bfloat16 where the processor has fast bfloat16, else float32.
    compile: 'on' compiles the step, 'off' does not, 'auto' does where there is a C++ compiler and enough
    steps are left to pay for it. Compiled or not, the run is the same: see `CompiledLoss`.
    """

    steps: int
    lr: float
    muon_lr: float | None = None
    warmup: int = 20
    decay: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    lr_factors: tuple[tuple[str, float], ...] = ()
    precision: str = "auto"
    compile: str = "auto"
    save_every: float = 120.0
    seconds: float | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        check_size("steps", self.steps)
        check_precision(self.precision)
        check_choice(self.compile)


def schedule(step: int, config: TrainConfig, seconds: float = 0.0) -> float:
    """Factor on the learning rate after so many seconds: warm-up, plateau, linear decay to zero."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    if config.seconds is not None:
        left = min(left, (config.seconds - seconds) / (config.decay * config.seconds))
    return rise * max(0.0, min(1.0, left))


def lr_factor(name: str, config: TrainConfig) -> float:
    """Factor on the learning rate of the weight called `name`."""
    return next((factor for end, factor in config.lr_factors if name.endswith(end)), 1.0)


def make_optimizers(
    named: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, weight in named.items():
        factor, is_matrix = lr_factor(name, config), weight.ndim >= 2
        table = any(part in name for part in ("embed", "head", "relative"))
        outside = factor != 1.0 or weight.ndim != 2 or table
        if config.muon_lr is None or outside:
            rest.setdefault((is_matrix, factor), []).append(weight)
        else:
            matrices.append(weight)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.muon_lr or 0.0,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        groups = [
            {
                "params": weights,
                "lr": config.lr * factor,
                "weight_decay": config.weight_decay if is_matrix else 0.0,
            }
            for (is_matrix, factor), weights in sorted(
                rest.items(), key=lambda item: (not item[0][0], item[0][1])
            )
        ]
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas))
    return optimizers


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; the second Ctrl-C stops at once.

    A step that is cut in two leaves half of the weights updated, so the first one waits for its
    end.
    """
    pressed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


class Trainer:
    """Runs `loss_fn(batch_fn(step))` for every step and keeps a resumable state in `folder`.

    With several processes `batch_fn` gives each its own windows; gradients are averaged and the
    main process writes. sequence_parallel: so many processes share each window.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        batch_fn: BatchFn,
        config: TrainConfig,
        folder: Path,
        *,
        label: str,
        accelerator: Accelerator | None = None,
        sequence_parallel: int = 1,
    ) -> None:
        self.config, self.folder, self.label = config, Path(folder), label
        self.accelerator = accelerator or make_accelerator()
        self.precision = computed_in(config.precision, self.accelerator.device)
        # of how many processes the windows differ
        self.readers = self.accelerator.num_processes // sequence_parallel
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.named:
            raise TrainingError(f"{label}: nothing to train, every weight is frozen")
        self.optimizers = make_optimizers(self.named, config)
        self.base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.loss_fn, self.batch_fn = loss_fn, batch_fn
        self._compiled: CompiledLoss | None = None
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []

    def run(self, *, resume: bool = False) -> list[dict[str, float]]:
        """Train to the last step; returns the log. Ctrl-C saves the state, then propagates.

        Raises TrainingError when the loss is not finite; the last good state stays on disk.
        """
        if resume:
            self.load()
            if self._done():
                return self.log
        else:
            # a full or read-only disk shows now, not after minutes of work
            self.save()
        with (
            Progress(self.label, total=self.config.steps, start=self.step) as progress,
            deferred_interrupt() as interrupted,
            Prefetch(self.batch_fn, self.accelerator.device, self.config.steps) as batches,
        ):
            self._run_steps(progress, interrupted, batches)
        self.save()
        return self.log

    def _run_steps(
        self, progress: Progress, interrupted: Callable[[], bool], batches: BatchFn
    ) -> None:
        saved_at = began = time.monotonic()
        before, first = self.seconds, self.step
        if self.config.compile == "on":
            self._consider_compiling(0.0)
        while not self._done():
            step_began = time.monotonic()
            loss, tokens = self._train_step(batches(self.step))
            now = time.monotonic()
            self.step += 1
            self.tokens += tokens
            self.seconds = before + now - began
            self._record(loss, progress)
            if self.step - first == _PROBE_STEPS:
                self._consider_compiling(now - step_began)
            if interrupted():
                self.save()
                raise KeyboardInterrupt
            if now - saved_at > self.config.save_every:
                self.save()
                saved_at = now

    def _done(self) -> bool:
        limit = self.config.seconds
        return self.step >= self.config.steps or (limit is not None and self.seconds >= limit)

    def _consider_compiling(self, step_seconds: float) -> None:
        """Compile now if it is wanted and pays; step_seconds: what a plain step takes, 0 if unknown."""
        if self._compiled is not None or self.config.compile == "off":
            return
        left = (self.config.steps - self.step) * step_seconds
        if self.config.compile == "auto" and left < _COMPILE_PAYS_AFTER:
            return
        if not has_compiler():
            log.info("%s: steps are not compiled: no C++ compiler found", self.label)
            return
        log.info("%s: compiling the step", self.label)
        self._compiled = CompiledLoss(self.loss_fn, self.named, self.label)

    def _train_step(self, batch: torch.Tensor) -> tuple[float, int]:
        factor = schedule(self.step, self.config, self.seconds)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        with torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        ):
            loss = (self._compiled or self.loss_fn)(batch)
        value = self._finite(loss)
        self.accelerator.backward(loss)
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(list(self.named.values()), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # a batch that carries states has a third axis, and no more tokens for it
        return value, batch[:, 1:].shape[:2].numel() * self.readers

    def _finite(self, loss: torch.Tensor) -> float:
        """The loss, averaged over the processes so that all of them stop together."""
        value = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.label}: the loss became {value} at step {self.step}; lower --lr or look at "
                f"the data. The last good state is in {self.folder}"
            )
        return value

    def _average_gradients(self) -> None:
        """Data parallelism without a wrapper: loss functions call submodules, not `forward`."""
        if self.accelerator.num_processes == 1:
            return
        for weight in self.named.values():
            if weight.grad is not None:
                weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")

    def _record(self, loss: float, progress: Progress) -> None:
        rate = self.tokens / max(self.seconds, 1e-9)
        progress.update(self.step, f"loss {loss:.4f}  {rate:,.0f} tok/s")
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            self.log.append(
                {
                    "step": self.step,
                    "loss": round(loss, 5),
                    "tokens": self.tokens,
                    "seconds": round(self.seconds, 1),
                    "compiled": self._compiled is not None and self._compiled.compiled,
                }
            )

    def save(self) -> None:
        """Replace `folder` by the current state."""
        if not self.accelerator.is_main_process:
            return
        meta = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "log": self.log,
            "precision": self.precision,
            "config": asdict(self.config),
        }
        with replace_dir(self.folder) as aside:
            try:
                save_file(self._state_tensors(), aside / "state.safetensors")
            except SafetensorError as error:
                kept = "; the state before is still there" if self.has_state else ""
                raise CheckpointError(f"could not write {self.folder}: {error}{kept}") from error
            (aside / "state.json").write_text(json.dumps(meta), encoding="utf-8")

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"weight.{n}": p.detach().contiguous() for n, p in self.named.items()}
        for i, optimizer in enumerate(self.optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {
                    f"moment.{i}.{index}.{key}": torch.as_tensor(value).contiguous()
                    for key, value in moments.items()
                }
        return tensors

    @property
    def has_state(self) -> bool:
        """True when `folder` holds a state to resume from."""
        return (self.folder / "state.json").exists()

    def load(self) -> None:
        """Continue from `folder`; raises TrainingError when there is nothing to continue."""
        folder = self.folder
        if not self.has_state:
            raise TrainingError(f"nothing to resume in {folder}; run without --resume first")
        meta, tensors = read_state(folder, self.named)
        self._check_precision(meta.precision)
        with torch.no_grad():
            for name, weight in self.named.items():
                weight.copy_(tensors[f"weight.{name}"])
        self._load_moments(tensors)
        self.step, self.tokens = meta.step, meta.tokens
        self.seconds, self.log = meta.seconds, meta.log

    def _check_precision(self, before: str | None) -> None:
        """Raise TrainingError for a state of a run that computed in another precision."""
        # an older state does not say
        if before not in (None, self.precision):
            raise TrainingError(
                f"the run in {self.folder} computed with precision {before}, on this machine precision "
                f"{self.config.precision} is {self.precision}; resume where it is {before}, or begin again "
                "without --resume"
            )

    def _load_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            moments: dict[int, dict[str, Any]] = {}
            for key, value in tensors.items():
                kind, *rest = key.split(".")
                if kind == "moment" and int(rest[0]) == i:
                    moments.setdefault(int(rest[1]), {})[rest[2]] = value
            optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def mean_loss(log: Iterable[Mapping[str, float]], last: int = 10) -> float:
    """Mean of the last `last` logged losses, in nats."""
    tail = [entry["loss"] for entry in log][-last:]
    return sum(tail) / len(tail)


def log_lines(log: Iterable[Mapping[str, float | str]]) -> str:
    """A log as the text of a .jsonl file."""
    return "".join(json.dumps(entry) + "\n" for entry in log)
