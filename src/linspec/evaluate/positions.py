"""Perplexity by position: does a model drift when a text grows past what it was trained on?

    report = by_position("student", length=32768)
    print(report.drift)

Every token is predicted twice: in one long text, and in a window of the training context. Their
difference is what the length does; the difficulty of the text at that place cancels out.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from linspec.checkpoints.hub import with_tokenizer
from linspec.errors import InputError, NotFinite
from linspec.evaluate.perplexity import held_out_documents
from linspec.models.decoder import Decoder
from linspec.train.data import Sources, check_sources, end_of_text, tokenize
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size

LENGTH = 32_768
_FIRST_BIN = 256
# logits that exist at once: what bounds the memory
_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions begin..end-1. perplexity: in the long text; fresh: in windows of the context."""

    begin: int
    end: int
    perplexity: float
    fresh: float


@dataclass(frozen=True, slots=True)
class Positions:
    """Perplexity by position, in stretches that double.

    drift: perplexity over that in fresh windows, beyond the context (inside it where the text ends
    there); 1.0 or less is none. limit: why the text is shorter than asked for, or None.
    """

    length: int
    context: int
    texts: int
    stretches: tuple[Stretch, ...]
    drift: float
    limit: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def by_position(
    model: str | Path | Decoder,
    *,
    tokenizer: Any = None,
    data: Sources = ("stdlib",),
    field: str = "text",
    length: int = LENGTH,
    context: int | None = None,
    texts: int = 4,
    device: str = "cpu",
) -> Positions:
    """Perplexity of up to `texts` texts of `length` tokens of held-out documents, end to end.

    context: tokens of a fresh window (default: the model's `max_positions`), which start half a
    window apart. A softmax model's texts end at its positions, and held-out text that is too short
    shortens them: `limit` says so. Raises ConfigError for sizes below 2, InputError without text.
    """
    data = check_sources(data)
    check_size("length", length, least=2)
    check_size("texts", texts)
    if context is not None:
        check_size("context", context, least=2)
    model, tokenizer = with_tokenizer(model, tokenizer, device=device)
    context = model.config.max_positions if context is None else context
    end = end_of_text(tokenizer, model.config)
    stream = torch.from_numpy(
        tokenize(held_out_documents(data, field), tokenizer, end).astype("int64")
    )
    usable, limit = _usable(model, length, len(stream) - 1)
    context = min(context, usable)
    count = min(texts, (len(stream) - 1) // usable)
    long, fresh = torch.zeros(usable), torch.zeros(usable)
    with Progress("positions", count) as progress:
        for i in range(count):
            ids = stream[i * usable : (i + 1) * usable + 1].to(model.device)
            long += _losses(model, ids).cpu() / count
            fresh += _fresh_losses(model, ids, context).cpu() / count
            progress.update(i + 1)
    beyond = slice(context, None) if usable > context else slice(None)
    if not bool(torch.isfinite(long.sum() + fresh.sum())):
        raise NotFinite("the losses of the held-out text")
    drift = math.exp(float(long[beyond].mean() - fresh[beyond].mean()))
    return Positions(usable, context, count, _stretches(long, fresh), drift, limit)


def _usable(model: Decoder, length: int, available: int) -> tuple[int, str | None]:
    """How long the texts can be, and why not as long as asked for."""
    if available < 2:
        raise InputError("there is too little text; give a file of more than a few words")
    bound = model.config.position_limit
    if bound is not None and bound < min(length, available):
        return bound, f"this softmax model ends at {bound} positions"
    if available < length:
        return available, f"the held-out text ends after {available} tokens"
    return length, None


@torch.inference_mode()
def _losses(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Nats of each next token of ids [T + 1], all before it in view: [T]."""
    states = model.hidden(ids[None, :-1])[0]
    size = max(1, _LOGITS // model.config.vocab_size)
    return torch.cat(
        [
            F.cross_entropy(model.head(part).float(), wanted, reduction="none")
            for part, wanted in zip(states.split(size), ids[1:].split(size), strict=True)
        ]
    )


def _fresh_losses(model: Decoder, ids: torch.Tensor, context: int) -> torch.Tensor:
    """As `_losses`, but from windows of `context` tokens, half a window apart."""
    total, stride = len(ids) - 1, max(1, context // 2)
    out = ids.new_zeros(total, dtype=torch.float32)
    done = 0
    for start in range(0, total, stride):
        end = min(start + context, total)
        if end > done:
            losses = _losses(model, ids[start : end + 1])
            out[done:end] = losses[done - start :]
            done = end
    return out


def _stretches(long: torch.Tensor, fresh: torch.Tensor) -> tuple[Stretch, ...]:
    edges = [0]
    edge = _FIRST_BIN
    while edge < len(long):
        edges.append(edge)
        edge *= 2
    edges.append(len(long))
    return tuple(
        Stretch(begin, end, *(math.exp(float(x[begin:end].mean())) for x in (long, fresh)))
        for begin, end in pairwise(edges)
    )
