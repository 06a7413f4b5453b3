"""Whether a student's sums over closed groups lower the loss: measured beyond the trained length.

A sum without a denominator grows with the text, so an α that helps within the training context can harm
behind it. A student reads texts of any length: what its sums do there decides whether they stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from linspec.train.data import Windows
from linspec.train.finetune import finetune_loss
from linspec.train.objective import Predictor, blocks_of

# texts of so many times the training context ...
BEYOND = 4
# ... so many of them
TEXTS = 4


@dataclass(frozen=True, slots=True)
class SumsReport:
    """Nats per token with and without the sums, in texts of the trained length and of `BEYOND` times it.

    kept: whether the sums stayed: only if they help in the long texts too.
    """

    with_sums: float
    without: float
    long_with_sums: float
    long_without: float
    kept: bool

    def to_json(self) -> dict[str, float | bool]:
        """Plain JSON types."""
        return asdict(self)


def alphas(model: Predictor) -> list[nn.Parameter]:
    """The share of the sums in every layer that has a learned one beside the teacher's exact weights.

    Other kernels have learned to lean on their sums: there they are part of the method.
    """
    mixers = (block.mixer for block in blocks_of(model))
    found = (getattr(m, "alpha", None) for m in mixers if m.mixer.kernel == "softmax")
    return [alpha for alpha in found if isinstance(alpha, nn.Parameter)]


@torch.no_grad()
def keep_useful_sums(
    student: Predictor, windows: Windows, loss: Callable[..., torch.Tensor] = finetune_loss
) -> SumsReport | None:
    """Set α to 0 in all layers of `student` unless the sums lower the loss of long training texts.

    None for a student that has no α, or none that is not 0.
    """
    learned = alphas(student)
    if not any(bool(alpha) for alpha in learned):
        return None
    device = learned[0].device
    lengths = ((BEYOND * TEXTS, windows.context), (TEXTS, BEYOND * windows.context))
    batches = [windows.batch(0, rows, context).to(device) for rows, context in lengths]
    before = [alpha.clone() for alpha in learned]
    near, far = (float(loss(student, batch)) for batch in batches)
    for alpha in learned:
        alpha.zero_()
    near_without, far_without = (float(loss(student, batch)) for batch in batches)
    kept = far < far_without
    if kept:
        for alpha, value in zip(learned, before, strict=True):
            alpha.copy_(value)
    return SumsReport(near, near_without, far, far_without, kept)
