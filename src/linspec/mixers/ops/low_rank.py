"""Keys of a segment as a product of two thin matrices, and the means that stand for its chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def factors(keys: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left [S, r] and right [Hkv, r, K], whose product is nearest to keys [Hkv, S, K] (Eckart & Young 1936).

    The heads of a position are one row, so that they share `left`. With full rank nothing is lost. Gradients
    flow to the keys within the space that is kept, not to the space.
    """
    rows = keys.transpose(0, 1).flatten(1)
    wide = rows.detach().double()
    tall = len(rows) >= rows.shape[1]
    # eigenvectors of the smaller of the two matrices of products: singular vectors, in rising order
    vectors = torch.linalg.eigh(wide.mT @ wide if tall else wide @ wide.mT)[1][:, -rank:].to(keys)
    left, right = (rows @ vectors, vectors.mT) if tall else (vectors, vectors.mT @ rows)
    return left, right.unflatten(1, (len(keys), -1)).transpose(0, 1)


def landmarks(chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean key [..., K] of chunks [..., c, K], and how like it the most unlike key of each is, [...]."""
    mean = chunks.mean(-2)
    return mean, F.cosine_similarity(mean[..., None, :], chunks, dim=-1).amin(-1)
