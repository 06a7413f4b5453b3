"""How often guesses are right, counted on held-out text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from linspec.models.decoder import Decoder
from linspec.train.drafters.base import RANKS, check_length
from linspec.train.drafters.walk import Walk
from linspec.utils.progress import Progress

# token ids of a window, ranks -> the target's choices [T], guesses [T, depths, ranks] behind each of them
Guesses = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def count_hits(
    target: Decoder,
    guesses: Guesses,
    stream: np.ndarray,
    *,
    depths: int,
    kind: str,
    context: int,
    tokens: int,
    most: int = 0,
    walk: Walk | None = None,
) -> list[list[float]]:
    """The share of places where the rank-k guess for a depth is what the target chooses there.

    guesses[t, i] is what a draft behind token t + 1 has for depth i + 1. Measured on consecutive windows of
    `context` tokens, `tokens` in all; RANKS columns, or fewer for a tiny
    vocabulary. most: tokens that can be drafted, 0 for all. walk: counts the rounds in the same windows.
    """
    length, limit = min(len(stream), max(tokens, context)), target.config.position_limit
    # drafts need places behind the last token
    context = min(context, length, (limit or length + depths) - depths)
    check_length(context, depths, kind)
    ranks = min(RANKS, most or target.config.vocab_size)
    hits, seen = np.zeros((depths, ranks)), np.zeros((depths, 1))
    starts = range(0, length - context + 1, context)
    with Progress(f"calibrate {kind}", len(starts)) as progress:
        for done, start in enumerate(starts, 1):
            window = np.asarray(stream[start : start + context], dtype=np.int64)
            ids = torch.from_numpy(window).to(target.device)
            chosen, guessed = guesses(ids, ranks)
            if walk is not None:
                walk.add(ids, chosen, guessed[:-1, :, :1])
            for i in range(depths):
                right = guessed[: -i - 1, i] == chosen[i + 1 :, None]
                hits[i] += right.sum(0).cpu().numpy()
                seen[i] += len(right)
            progress.update(done)
    return [[round(rate, 5) for rate in row] for row in (hits / seen).tolist()]


def probe_parents(nodes: int, probes: int) -> tuple[int, ...]:
    """The parents of a chain of `nodes` nodes and, behind it, of a chain of `probes` below each of them."""
    below = (
        node if i == 0 else nodes + node * probes + i - 1
        for node in range(nodes)
        for i in range(probes)
    )
    return (*range(-1, nodes - 1), *below)
