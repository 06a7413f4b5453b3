"""The training loop that pretraining, linearization and drafter training share.

Batches are a function of (seed, step), so a run that is killed and resumed sees exactly the data it
would have seen. The state of a run lives in `out/training/`: one safetensors file with the trained
weights and the optimizers' moments, one JSON file with the step, replaced as a whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from linspec.errors import ConfigError, TrainingError
from linspec.files import replace_dir
from linspec.progress import Progress

LossFn = Callable[[torch.Tensor], torch.Tensor]
BatchFn = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train.

    steps: optimizer steps. warmup: steps of linear rise. decay: share of the steps, at the end, over
    which the learning rate falls linearly to zero. save_every: seconds between checkpoints.
    muon_lr: when set, 2-D weights of the blocks use Muon with this rate, the rest AdamW with `lr`.
    precision: 'auto' computes in bfloat16 where the processor has fast bfloat16, else float32.
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
    precision: str = "auto"
    compile: bool = False
    save_every: float = 120.0
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be 1 or more, got {self.steps}")
        if self.precision not in ("auto", "bf16", "float32"):
            raise ConfigError(f"precision must be auto, bf16 or float32, got {self.precision!r}")


def schedule(step: int, config: TrainConfig) -> float:
    """Factor on the learning rate: warm-up, plateau, linear decay to zero."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return rise * min(1.0, left)


def fast_bfloat16(device: torch.device) -> bool:
    """True when bfloat16 matrix products are quicker than float32 on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    # without these instructions bfloat16 products are emulated, several times slower than float32
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def make_optimizers(
    named: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest."""
    matrices, rest = [], []
    for name, weight in named.items():
        use_muon = config.muon_lr is not None and weight.ndim == 2 and "embed" not in name and "head" not in name
        (matrices if use_muon else rest).append(weight)
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
        decayed = [w for w in rest if w.ndim >= 2]
        plain = [w for w in rest if w.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizers.append(
            torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
        )
    return optimizers


class Trainer:
    """Runs `loss_fn(batch_fn(step))` for every step and keeps a resumable state in `out`."""

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        batch_fn: BatchFn,
        config: TrainConfig,
        out: Path,
        *,
        label: str,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config, self.out, self.label = config, Path(out), label
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.named:
            raise TrainingError(f"{label}: nothing to train, every weight is frozen")
        self.optimizers = make_optimizers(self.named, config)
        self.base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.loss_fn = torch.compile(loss_fn) if config.compile else loss_fn
        self.batch_fn = batch_fn
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
        saved_at = started = time.monotonic()
        before = self.seconds
        with Progress(self.label, total=self.config.steps, start=self.step) as progress:
            try:
                while self.step < self.config.steps:
                    loss, tokens = self._train_step()
                    self.step += 1
                    self.tokens += tokens
                    now = time.monotonic()
                    self.seconds = before + now - started
                    self._record(loss, progress)
                    if now - saved_at > self.config.save_every:
                        self.save()
                        saved_at = now
            except KeyboardInterrupt:
                self.save()
                raise
        self.save()
        return self.log

    def _train_step(self) -> tuple[float, int]:
        factor = schedule(self.step, self.config)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        batch = self.batch_fn(self.step).to(self.accelerator.device)
        with torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=self._use_bfloat16()
        ):
            loss = self.loss_fn(batch)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.label}: the loss became {value} at step {self.step}; lower --lr or look at "
                f"the data. The last good state is in {self.out / 'training'}"
            )
        self.accelerator.backward(loss)
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(list(self.named.values()), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value, batch[:, 1:].numel() * self.accelerator.num_processes

    def _average_gradients(self) -> None:
        """Data parallelism without a wrapper: loss functions call submodules, not `forward`."""
        if self.accelerator.num_processes == 1:
            return
        for weight in self.named.values():
            if weight.grad is not None:
                weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")

    def _use_bfloat16(self) -> bool:
        if self.config.precision == "auto":
            return fast_bfloat16(self.accelerator.device)
        return self.config.precision == "bf16"

    def _record(self, loss: float, progress: Progress) -> None:
        rate = self.tokens / max(self.seconds, 1e-9)
        progress.update(self.step, f"loss {loss:.4f}  {rate:,.0f} tok/s")
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            self.log.append(
                {"step": self.step, "loss": round(loss, 5), "tokens": self.tokens, "seconds": round(self.seconds, 1)}
            )

    def save(self) -> None:
        """Replace `out/training` by the current state."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"weight.{n}": p.detach().contiguous() for n, p in self.named.items()}
        for i, optimizer in enumerate(self.optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {
                    f"moment.{i}.{index}.{key}": torch.as_tensor(value).contiguous()
                    for key, value in moments.items()
                }
        meta = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "log": self.log,
            "config": asdict(self.config),
        }
        with replace_dir(self.out / "training") as folder:
            save_file(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps(meta))

    def load(self) -> None:
        """Continue from `out/training`; raises TrainingError when there is nothing to continue."""
        folder = self.out / "training"
        if not (folder / "state.json").exists():
            raise TrainingError(f"nothing to resume in {self.out}; run without --resume first")
        meta = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / "state.safetensors")
        saved = {k.removeprefix("weight.") for k in tensors if k.startswith("weight.")}
        if saved != set(self.named):
            raise TrainingError(f"{folder} belongs to another model or recipe; use another --out")
        with torch.no_grad():
            for name, weight in self.named.items():
                weight.copy_(tensors[f"weight.{name}"])
        self._load_moments(tensors)
        self.step, self.tokens = meta["step"], meta["tokens"]
        self.seconds, self.log = meta["seconds"], meta["log"]

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
