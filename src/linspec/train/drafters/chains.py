"""Rows that a drafter puts behind a text inside the target, in training: they see the text and each other."""

from __future__ import annotations

import hashlib

import torch

from linspec.models.decoder import Decoder
from linspec.train.pieces import Output, Teacher, loss_in_pieces


def hidden_behind(target: Decoder, ids: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Final states [B, P, D] of `embeddings` [P, D] that stand in place of P tokens behind ids [B, T]."""
    count, length = len(embeddings), ids.shape[1]
    padded = torch.nn.functional.pad(ids, (0, count))
    text = target.enter(padded, torch.arange(padded.shape[1], device=ids.device))[0][:, :length]
    own = _placed(target, embeddings.to(text), length)
    return upper_hidden(target, text, own.expand(len(ids), -1, -1), first=0)


def _placed(target: Decoder, embeddings: torch.Tensor, position: int) -> torch.Tensor:
    """What the first layer sees of embeddings [P, D] from `position` on; see `Decoder.enter`."""
    embeddings = embeddings * target.config.embedding_scale
    if target.config.positions == "learned":
        positions = torch.arange(position, position + len(embeddings), device=embeddings.device)
        embeddings = embeddings + target.embed_positions(positions)
    return embeddings


def upper_hidden(
    target: Decoder, text: torch.Tensor, rows: torch.Tensor, first: int
) -> torch.Tensor:
    """Final states [B, P, D] of rows [B, P, D] behind a text [B, T, D], as the layer `first` sees them."""
    x = torch.cat((text, rows.to(text)), 1)
    positions = torch.arange(x.shape[1], device=x.device)
    ropes = target.enter(torch.zeros_like(positions)[None], positions)[1]
    for block, rope in zip(target.layers[first:], ropes[first:], strict=True):
        x = block(x, rope)
    return target.leave(x[:, text.shape[1] :])


def cut_of(ids: torch.Tensor, most: int) -> int:
    """Tokens before a cut, 1 to `most`, drawn from the text itself: a resumed run cuts there too."""
    digest = hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % most


def divergence(
    target: Decoder, found: torch.Tensor, wanted: torch.Tensor, decay: float
) -> torch.Tensor:
    """(1/P) · Σ_i decay^i · KL(target after states `wanted` ‖ after `found`), both [B, P, D] and final."""
    rows, places = found.shape[:2]
    weights = decay ** torch.arange(places, device=found.device) / (rows * places)
    output = Output.of(target.head)
    known = Teacher(wanted, output, weights.expand(rows, -1))
    return loss_in_pieces(found, output, teacher=known)
