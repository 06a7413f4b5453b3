"""The likeliest token of each row of logits: what every greedy round asks for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def likeliest(logits: Tensor) -> tuple[list[int], list[float]]:
    """The first token with the greatest score in each row of [N, V], and these scores; NaN where one is."""
    if logits.device.type != "cpu":
        found = likeliest_on_device(logits)
        # one copy to the host for both
        tokens, scores = torch.stack([each.double() for each in found]).tolist()
        return [int(token) for token in tokens], scores
    # numpy goes over a row once, with the whole width of the processor, where torch compares one by one
    rows = (logits.float() if logits.itemsize < 4 else logits).numpy()
    found = rows.argmax(-1)
    return found.tolist(), rows[np.arange(len(rows)), found].tolist()


def likeliest_on_device(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same of logits [..., V], as tensors [...]: nothing waits for the device."""
    best = logits.max(-1)
    return best.indices, best.values


def likeliest_token(scores: Tensor) -> int:
    """The first token with the greatest of the scores [V]."""
    return likeliest(scores[None])[0][0]
