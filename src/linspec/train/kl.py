"""KL(teacher ‖ student) over large vocabularies, a few tokens at a time.

Logits of 32k tokens over 49k words are 6 GiB in float32, and a loss by autograd keeps several such tensors.
Here the gradient of each piece is computed beside its loss, in closed form: softmax(student) -
softmax(teacher), through the student's output layer, which stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from linspec.errors import TrainingError
from linspec.mixers.ops.exact import capped
from linspec.models.head import cap_of

_PIECE = 4096


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        wanted: torch.Tensor,
        head: torch.Tensor,
        teacher_head: torch.Tensor,
        caps: tuple[float, float],
    ) -> torch.Tensor:
        wide = torch.promote_types(given.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=given.device)
        slope = torch.empty_like(given)
        head, teacher_head = head.to(wide), teacher_head.to(wide)
        # bfloat16 logits would be off by a tenth of a nat
        with torch.autocast(given.device.type, enabled=False):
            for start in range(0, len(given), _PIECE):
                part = slice(start, start + _PIECE)
                log_p = capped(wanted[part].to(wide) @ teacher_head.T, caps[1]).log_softmax(-1)
                log_q = capped(given[part].to(wide) @ head.T, caps[0]).log_softmax(-1)
                p = log_p.exp()
                total += (p * log_p.sub_(log_q)).sum()
                change = log_q.exp_() - p
                if caps[0]:
                    # what the cap makes of a small change; logits again, for they take much room
                    logits = given[part].to(wide) @ head.T
                    change = change * (1 - torch.tanh(logits / caps[0]).square())
                slope[part] = (change @ head).to(slope.dtype)
        ctx.save_for_backward(slope / len(given))
        return total / len(given)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad, None, None, None, None


def kl_of_hidden(
    given: torch.Tensor, wanted: torch.Tensor, head: nn.Module, teacher_head: nn.Module
) -> torch.Tensor:
    """Mean KL in nats between what the heads make of final states [N, D]; a gradient for `given` only.

    Raises TrainingError for an output layer that is trained: it would get no gradient.
    """
    weights = head.get_parameter("weight"), teacher_head.get_parameter("weight")
    if any(weight.requires_grad for weight in weights):
        raise TrainingError(
            "a KL loss in pieces needs a frozen output layer; freeze the embeddings"
        )
    caps = cap_of(head), cap_of(teacher_head)
    found: torch.Tensor = _Kl.apply(given, wanted, *weights, caps)  # type: ignore[no-untyped-call]  # torch's
    return found
