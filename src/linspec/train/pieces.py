"""Losses over a vocabulary from hidden states, a few tokens at a time: whole logits are never there.

Logits of 16k tokens over 49k words are 3.2 GB in float32, and a loss by autograd keeps several such tensors.
Here each piece of logits is gone before the next is made: its gradient is computed beside its loss, in closed
form, and goes through the output layer at once. So the work is that of the whole form.

    output = Output.of(model.head)
    loss = loss_in_pieces(states, output, Labels(ids), Teacher(wanted, Output.of(teacher.head)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from linspec.errors import TrainingError
from linspec.mixers.ops.exact import capped
from linspec.models.head import cap_of

# a label that asks for nothing
IGNORED = -100
# Logits of a piece. Fewer would read and write the weights and their gradient too often.
PIECE_LOGITS = 1 << 25


@dataclass(frozen=True, slots=True)
class Output:
    """An output layer, logits cap(x · weightᵀ + bias): weight [V, D], bias [V] or None, cap 0 for none."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    cap: float = 0.0

    @classmethod
    def of(cls, head: nn.Module) -> Output:
        """That of a module; raises TrainingError for one in its inference form."""
        if not isinstance(head, nn.Linear) or head._forward_hooks:
            raise TrainingError(
                f"an output layer of type {type(head).__name__} is in its inference form, which is not "
                "trained through; load the model again for training"
            )
        return cls(head.weight, head.bias, cap_of(head))


@dataclass(frozen=True, slots=True)
class Labels:
    """Cross-entropy: -weights · log q(ids), of ids [...] where IGNORED ones count nothing.

    weights [...]: None for the mean of those that count.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Teacher:
    """weights · KL(p ‖ q), where p is what `output` makes of the teacher's states [..., D'].

    weights: [...], or a number by which the mean counts. soft: the cross-entropy -Σ p log q
    instead, which has the same gradient. No gradient goes to the teacher.
    """

    states: torch.Tensor
    output: Output
    weights: torch.Tensor | float = 1.0
    soft: bool = False


@dataclass(frozen=True, slots=True)
class Entropy:
    """weights · H(q at a temperature), weights [...]."""

    weights: torch.Tensor
    temperature: float = 1.0


class _Plan(NamedTuple):
    """What is no tensor: caps of student and teacher, the dtype of products, tokens of a piece, and what gets
    a gradient: the states, the weight, the bias."""

    cap: float
    teacher_cap: float
    soft: bool
    temperature: float
    kind: torch.dtype
    piece: int
    trained: tuple[bool, bool, bool]


def loss_in_pieces(
    states: torch.Tensor,
    output: Output,
    labels: Labels | None = None,
    teacher: Teacher | None = None,
    entropy: Entropy | None = None,
    *,
    piece: int | None = None,
) -> torch.Tensor:
    """The sum of the terms that are given over tokens whose final states are [..., D]: one number, in nats.

    Gradients for the states, and for weight and bias of the output layer where these are trained. Products
    are computed in the dtype of the states, or of autocast; sums are float32 or wider. piece: tokens at a
    time, which changes no more than rounding; None for `piece_size`, about 0.13 GB in float32.

    Raises TrainingError where a term is of other tokens than the states.
    """
    shape, flat = states.shape[:-1], states.flatten(0, -2)
    kind = _product_dtype(states)
    wide = torch.promote_types(kind, torch.float32)
    ids, shares = (None, None) if labels is None else _counted(labels, shape, wide)
    wanted = kl = None
    known = Output(output.weight.detach())
    if teacher is not None:
        _check(teacher.states.shape[:-1], shape)
        wanted, known = teacher.states.detach().flatten(0, -2), teacher.output
        kl = _weights(teacher.weights, shape, flat, wide)
    doubt = None if entropy is None else _weights(entropy.weights, shape, flat, wide)
    trained = [
        x is not None and x.requires_grad and torch.is_grad_enabled()
        for x in (flat, output.weight, output.bias)
    ]
    plan = _Plan(
        output.cap,
        known.cap,
        teacher is not None and teacher.soft,
        1.0 if entropy is None else entropy.temperature,
        kind,
        piece or piece_size(len(output.weight)),
        (trained[0], trained[1], trained[2]),
    )
    own = output.weight, output.bias
    # detached: a compiler refuses one tensor twice, as where both have the same output layer
    theirs = None if wanted is None else known.weight.detach()
    bias = None if known.bias is None else known.bias.detach()
    found: torch.Tensor = _Pieces.apply(  # type: ignore[no-untyped-call]  # torch's
        flat, *own, wanted, theirs, bias, ids, shares, kl, doubt, plan
    )
    return found


def kl_of_states(
    given: torch.Tensor, wanted: torch.Tensor, head: nn.Module, teacher_head: nn.Module
) -> torch.Tensor:
    """Mean KL in nats between what the heads make of final states [..., D], in float32 also under autocast.

    Logits in bfloat16 would be off by a tenth of a nat, and this is for students that are near their teacher.
    """
    wide = torch.promote_types(given.dtype, torch.float32)
    own, known = Output.of(head), Output.of(teacher_head)
    with torch.autocast(given.device.type, enabled=False):
        teacher = Teacher(wanted.to(wide), _as(known, wide))
        return loss_in_pieces(given.to(wide), _as(own, wide), teacher=teacher)


def piece_size(vocabulary: int) -> int:
    """Of how many tokens the logits are there at a time."""
    return max(1, PIECE_LOGITS // vocabulary)


@torch.no_grad()
def likeliest(states: torch.Tensor, head: nn.Module, vocabulary: int) -> torch.Tensor:
    """The likeliest token [...] behind states [..., D], by an output layer in any form."""
    parts = states.flatten(0, -2).split(piece_size(vocabulary))
    found = [head(part).argmax(-1) for part in parts]
    return torch.cat(found).view(states.shape[:-1])


def _as(output: Output, dtype: torch.dtype) -> Output:
    bias = None if output.bias is None else output.bias.to(dtype)
    return Output(output.weight.to(dtype), bias, output.cap)


def _product_dtype(states: torch.Tensor) -> torch.dtype:
    """In which dtype a linear layer multiplies them."""
    device = states.device.type
    if torch.is_autocast_enabled(device) and states.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return states.dtype


def _counted(
    labels: Labels, shape: torch.Size, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [N] and what each counts [N], in place of IGNORED ones any id that counts nothing."""
    _check(labels.ids.shape, shape)
    ids = labels.ids.flatten()
    known = ids != IGNORED
    if labels.weights is None:
        weights = known.to(wide) / known.sum().clamp(min=1)
    else:
        _check(labels.weights.shape, shape)
        weights = labels.weights.detach().flatten().to(wide) * known
    return ids.masked_fill(~known, 0), weights


def _weights(
    given: torch.Tensor | float, shape: torch.Size, like: torch.Tensor, wide: torch.dtype
) -> torch.Tensor:
    """[N]: as they are given, or those of a mean."""
    if not isinstance(given, torch.Tensor):
        return torch.full((len(like),), given / max(1, len(like)), dtype=wide, device=like.device)
    _check(given.shape, shape)
    return given.detach().flatten().to(wide)


def _check(given: torch.Size, shape: torch.Size) -> None:
    if given != shape:
        raise TrainingError(
            f"a loss over tokens {list(shape)} was given numbers for {list(given)}; give one for each token"
        )


class _Pieces(torch.autograd.Function):
    """The loss and, beside it, its gradients: backward only multiplies them."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: torch.Tensor | None,
        teacher_weight: torch.Tensor | None,
        teacher_bias: torch.Tensor | None,
        ids: torch.Tensor | None,
        shares: torch.Tensor | None,
        kl: torch.Tensor | None,
        doubt: torch.Tensor | None,
        plan: _Plan,
    ) -> torch.Tensor:
        kind, wide = plan.kind, torch.promote_types(plan.kind, torch.float32)
        own = weight.to(kind), None if bias is None else bias.to(kind)
        known = None
        if teacher_weight is not None:
            known = teacher_weight.to(kind), None if teacher_bias is None else teacher_bias.to(kind)
        slopes = [
            torch.zeros_like(source, dtype=wide) if source is not None and trained else None
            for source, trained in zip((states, weight, bias), plan.trained, strict=True)
        ]
        total = torch.zeros((), dtype=wide, device=states.device)
        for start in range(0, len(states), plan.piece):
            part = slice(start, start + plan.piece)
            x, log_p = states[part].to(kind), None
            if wanted is not None and known is not None:
                theirs = wanted[part].to(kind)
                log_p = _logits(theirs, *known, plan.teacher_cap, wide).log_softmax(-1)
            asked = _Asked(*(y if y is None else y[part] for y in (ids, shares, kl, doubt)))
            logits = _logits(x, *own, plan.cap, wide)
            log_q = logits.log_softmax(-1)
            kept = logits if plan.cap or doubt is not None else None
            # else nobody asks for them again, and they take as much as the rest of a piece
            del logits
            nats, slope = _piece(kept, log_q, log_p, asked, plan)
            total = total + nats
            if slope is not None:
                _add(slopes, part, x, slope.to(kind), own[0])
        ctx.save_for_backward(*slopes)
        ctx.kinds = tuple(None if x is None else x.dtype for x in (states, weight, bias))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.kinds, strict=True)
        found = [None if slope is None else (slope * grad).to(kind) for slope, kind in pairs]
        return *found, *(None,) * 8


def _logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cap: float,
    wide: torch.dtype,
) -> torch.Tensor:
    return capped(F.linear(x, weight, bias), cap).to(wide)


class _Asked(NamedTuple):
    """Of the tokens [n] of a piece: labels, and what cross-entropy, divergence and entropy count."""

    ids: torch.Tensor | None
    shares: torch.Tensor | None
    kl: torch.Tensor | None
    doubt: torch.Tensor | None


def _piece(
    logits: torch.Tensor | None,
    log_q: torch.Tensor,
    log_p: torch.Tensor | None,
    asked: _Asked,
    plan: _Plan,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nats of a piece [n, V], and their gradient for its logits before the cap if one is wanted.

    logits: only for a cap or an entropy. `log_q` and `log_p` are written over.
    """
    ids, shares, kl, doubt = asked
    nats, weights, more, p = log_q.new_zeros(()), log_q.new_zeros(len(log_q)), None, None
    if ids is not None and shares is not None:
        nats = nats - (log_q.gather(1, ids[:, None])[:, 0] * shares).sum()
        weights = weights + shares
    if log_p is not None and kl is not None:
        nats, weights = nats + (_divergence(log_p, log_q, plan.soft) * kl).sum(), weights + kl
        p = log_p.exp_().mul_(kl[:, None])
    if doubt is not None and logits is not None:
        each, more = _entropy(logits, doubt, plan.temperature)
        nats = nats + each
    if not any(plan.trained):
        return nats, None
    slope = log_q.exp_().mul_(weights[:, None])
    for part, sign in ((p, -1), (more, 1)):
        if part is not None:
            slope.add_(part, alpha=sign)
    if ids is not None and shares is not None:
        _take_labels(slope, ids, shares)
    if plan.cap and logits is not None:
        # what the cap makes of a small change
        slope.mul_(1 - (logits / plan.cap).square())
    return nats, slope


def _take_labels(slope: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> None:
    """Subtract shares [n] from a slope [n, V] where the labels are."""
    if torch.compiler.is_compiling():
        # the compiler of torch 2.13 puts a scatter and what follows it into one loop, which reads too early
        named = torch.arange(slope.shape[1], device=ids.device) == ids[:, None]
        slope.sub_(torch.where(named, shares[:, None], 0.0))
    else:
        slope.scatter_add_(1, ids[:, None], -shares[:, None])


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor, soft: bool) -> torch.Tensor:
    """[n]: see `Teacher`."""
    if soft:
        return -(log_p.exp() * log_q).sum(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def _entropy(
    logits: torch.Tensor, weights: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighed entropy of logits [n, V] at a temperature, and its gradient for them."""
    logs = (logits / temperature).log_softmax(-1)
    shares = logs.exp()
    each = -(shares * logs).sum(-1)
    slope = shares * (logs + each[:, None]) * (-weights / temperature)[:, None]
    return (each * weights).sum(), slope


def _add(
    slopes: list[torch.Tensor | None],
    part: slice,
    x: torch.Tensor,
    slope: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """Take the gradient for a piece of logits to the states `x` and the output layer that it comes from."""
    for_states, for_weight, for_bias = slopes
    if for_states is not None:
        for_states[part] = slope @ weight
    if for_weight is not None and for_weight.dtype == slope.dtype:
        for_weight.addmm_(slope.T, x)
    elif for_weight is not None:
        for_weight += slope.T @ x
    if for_bias is not None:
        for_bias += slope.sum(0)
