"""What a masked-diffusion model is trained on: windows with some of their tokens hidden.

The share that is hidden is drawn for each window, and each hidden token counts the inverse of it: a bound
on the likelihood of the text (Nie et al. 2025, arXiv 2502.09992, section 2 and equation 14).
"""

from __future__ import annotations

import numpy as np
import torch

from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.data import Windows
from linspec.train.pieces import Labels, Output, Teacher, loss_in_pieces

# how many windows begin with a prompt, of which nothing is hidden
_PROMPTED = 0.5


class MaskedWindows(Windows):
    """Windows of text, the same for the same seed and step, with the tokens to be hidden marked.

    A marked token t is written as -1 - t: one tensor says what is hidden and what it was.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows, self.context = windows, windows.context

    def batch(self, step: int, rows: int, context: int | None = None) -> torch.Tensor:
        """[rows, context], at least one token of each row marked."""
        # a window has one token more, which next-token training asks for
        ids = self.windows.batch(step, rows, context)[:, 1:]
        rng = np.random.default_rng([self.windows.seed, step, self.windows.process, 1])
        return torch.where(torch.from_numpy(_hidden(rng, *ids.shape)), -1 - ids, ids)


def _hidden(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """[rows, length] booleans. The number hidden in a row is uniform: from 1 to all behind its prompt."""
    starts = rng.integers(0, length, size=rows) * (rng.random(rows) < _PROMPTED)
    # spread evenly over the rows of a batch, which says more than as many independent numbers
    shares = (rng.random() + rng.permutation(rows) / rows) % 1
    counts = 1 + np.floor(shares * (length - starts)).astype(int)
    order = rng.random((rows, length))
    order[np.arange(length) < starts[:, None]] = np.inf
    return np.asarray(order.argsort(1).argsort(1) < counts[:, None])


def masked_loss(model: MaskedDiffusion, batch: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of a batch of `MaskedWindows` of their mean cross-entropy, in nats a hidden token.

    With c of n tokens hidden, the sum weighs n/c and is divided by n: the mean of the hidden ones.
    """
    return masked_finetune_loss(model, batch)


def masked_finetune_loss(
    student: MaskedDiffusion,
    batch: torch.Tensor,
    teacher: MaskedDiffusion | None = None,
    kl_weight: float = 0.0,
) -> torch.Tensor:
    """`masked_loss` plus kl_weight · KL(teacher ‖ student) at the hidden tokens, weighed in the same way."""
    ids, shares, at = _asked(batch)
    weights, known = shares / len(batch), None
    if teacher is not None and kl_weight != 0:
        with torch.no_grad():
            wanted = _states(teacher, batch, at)
        known = Teacher(wanted, Output.of(teacher.head), kl_weight * weights)
    states = _states(student, batch, at)
    return loss_in_pieces(states, Output.of(student.head), Labels(ids, weights), known)


def _asked(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [N] that are asked for, what each counts, and where they are in the batch."""
    hidden = batch < 0
    ids = torch.where(hidden, -1 - batch, batch)
    shares = (1 / hidden.sum(1, keepdim=True)) * hidden
    # a vocabulary can be larger than all the rest, so only what is hidden is asked for; not in a compiled
    # step, where the number of these would change shapes
    if torch.compiler.is_compiling():
        return ids.flatten(), shares.flatten(), hidden
    return ids[hidden], shares[hidden], hidden


def _states(model: MaskedDiffusion, batch: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Final states [N, D] of the tokens that are asked for."""
    states = model.telling(model.with_masks(batch))
    return states.flatten(0, 1) if torch.compiler.is_compiling() else states[at]
