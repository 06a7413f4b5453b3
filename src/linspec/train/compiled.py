"""A compiled loss: a second implementation, trusted for a shape only after its gradients were checked.

torch.compile has computed wrong gradients beside a right loss (the backward of overlapping views on a
CPU, torch 2.11 and 2.13), so a run checks every graph that it compiles on the first batch of that
shape, and stays with the plain loss where they differ.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._dynamo.exc import TorchDynamoException

from linspec.errors import ConfigError
from linspec.utils.messages import shown

log = logging.getLogger(__name__)

LossFn = Callable[[torch.Tensor], torch.Tensor]
Gradients = Mapping[str, torch.Tensor]

COMPILE_CHOICES = ("auto", "on", "off")
# A compiled gradient may differ from the plain one by this share of its norm ...
TOLERANCE = 1e-4
# ... where that norm is at least this share of the whole gradient's
SMALLEST_SHARE = 1e-3
# In bfloat16 both forms round: the compiled one may be this much further from float32 than the plain
ROUNDING_ALLOWANCE = 3.0


def check_choice(compile: str) -> None:
    """Raise ConfigError unless `compile` says when to compile."""
    if compile not in COMPILE_CHOICES:
        raise ConfigError(f"compile must be auto, on or off, got {shown(repr(compile))}")


@dataclass(frozen=True, slots=True)
class GradientDifference:
    """How far one weight's compiled gradient lies from the plain one, beside what is allowed."""

    name: str
    difference: float
    allowed: float

    @property
    def wrong(self) -> bool:
        """True when the difference is more than rounding, or not a number."""
        return not self.difference <= self.allowed


def gradients(
    loss_fn: LossFn, batch: torch.Tensor, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The gradient of `loss_fn(batch)` for each weight that takes part, float32 or wider."""
    found = torch.autograd.grad(loss_fn(batch), list(weights.values()), allow_unused=True)
    return {
        name: g if g.dtype.itemsize > 4 else g.float()
        for name, g in zip(weights, found, strict=True)
        if g is not None
    }


def float32_gradients(
    loss_fn: LossFn, batch: torch.Tensor, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """As `gradients`, without autocast: what both forms round when they compute in bfloat16."""
    with torch.autocast(batch.device.type, enabled=False):
        return gradients(loss_fn, batch, weights)


def compare(exact: Gradients, plain: Gradients, compiled: Gradients) -> list[GradientDifference]:
    """One entry a weight: the compiled gradient against the plain one, both beside the exact one.

    exact: in float32; the same as `plain` when no arithmetic is narrower.
    """
    whole = _norm(plain.values())
    # a weight of a few numbers may round little by chance: each is allowed what all do on the whole
    share = _norm(plain[name] - exact[name] for name in plain) / max(whole, 1e-30)
    found = []
    for name in sorted({*plain, *compiled}):
        if name not in plain or name not in compiled:
            found.append(GradientDifference(name, float("inf"), 0.0))
            continue
        scale = max(float(plain[name].norm()), SMALLEST_SHARE * whole)
        rounding = max(float((plain[name] - exact[name]).norm()), share * scale)
        difference = float((compiled[name] - exact[name]).norm())
        allowed = max(TOLERANCE * scale, ROUNDING_ALLOWANCE * rounding)
        found.append(GradientDifference(name, difference, allowed))
    return found


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    """The norm of all of them as one vector."""
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def compile_loss(loss_fn: LossFn) -> LossFn:
    """`loss_fn`, compiled; the only place where a training step is."""
    compiled: LossFn = torch.compile(
        loss_fn,
        # one graph a shape: a graph of several shapes would be checked on one of them only
        dynamic=False,
        # torch 2.13 writes the gradient of a softmax over its weights while a product still needs them
        options={"inplace_buffers": False},
    )
    return compiled


class CompiledLoss:
    """`loss_fn`, compiled once for each shape of a batch; plain for good once a gradient is wrong.

    weights: those that are trained, by name. Call it where the loss would be called, under the same
    autocast.
    """

    def __init__(self, loss_fn: LossFn, weights: Mapping[str, torch.Tensor], label: str) -> None:
        self.loss_fn, self.weights, self.label = loss_fn, weights, label
        self._compiled: LossFn | None = compile_loss(loss_fn)
        self._checked: set[tuple[Sequence[int], torch.dtype]] = set()

    @property
    def compiled(self) -> bool:
        """False once the plain loss is used for good."""
        return self._compiled is not None

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        key = (tuple(batch.shape), batch.dtype)
        if self._compiled is not None and key not in self._checked:
            self._check(batch)
            self._checked.add(key)
        return (self._compiled or self.loss_fn)(batch)

    def _check(self, batch: torch.Tensor) -> None:
        assert self._compiled is not None
        try:
            compiled = gradients(self._compiled, batch, self.weights)
        except TorchDynamoException as error:
            self._stay_plain(str(error).split("\n")[0])
            return
        plain = gradients(self.loss_fn, batch, self.weights)
        narrow = torch.is_autocast_enabled(batch.device.type)
        exact = float32_gradients(self.loss_fn, batch, self.weights) if narrow else plain
        differences = compare(exact, plain, compiled)
        wrong = [d for d in differences if d.wrong]
        if wrong:
            worst = max(wrong, key=lambda d: d.difference / max(d.allowed, 1e-30))
            self._stay_plain(
                f"on batches of shape {list(batch.shape)} compiled gradients of {len(wrong)} of "
                f"{len(differences)} weights are wrong (worst: {worst.name}, off by "
                f"{worst.difference:.2e} where {worst.allowed:.2e} is rounding)"
            )
            return
        log.info(
            "%s: compiled gradients equal plain ones on batches of shape %s",
            self.label,
            list(batch.shape),
        )

    def _stay_plain(self, reason: str) -> None:
        log.warning("%s: steps are not compiled: %s", self.label, reason)
        self._compiled = None


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler, which it needs on a CPU."""
    return any(map(shutil.which, ("c++", "g++", "clang++")))
