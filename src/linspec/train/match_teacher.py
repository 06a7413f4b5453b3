"""The loss of a student that only has to say what its teacher says: KL, and more of it where answers are.

The teacher's own words need no other label. Answers that hang on what stood far above are a few tokens of
a text of thousands, so their KL counts a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linspec.models.decoder import Decoder
from linspec.train.pieces import kl_of_states


@dataclass(frozen=True, slots=True)
class KlLoss:
    """Mean KL over all tokens of windows [B, T + 1], plus `answers` times that over marked ones.

    Marked tokens are written as -1 - id, as in `Needles.marked`.
    """

    teacher: Decoder
    student: Decoder
    answers: float = 0.1

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        marked = batch < 0
        ids = torch.where(marked, -1 - batch, batch)[:, :-1]
        with torch.no_grad():
            wanted = self.teacher.hidden(ids).flatten(0, 1)
        given = self.student.hidden(ids).flatten(0, 1)
        heads = self.student.head, self.teacher.head
        loss = kl_of_states(given, wanted, *heads)
        at = marked[:, 1:].flatten().nonzero()[:, 0]
        if self.answers and len(at):
            loss = loss + self.answers * kl_of_states(given[at], wanted[at], *heads)
        return loss
