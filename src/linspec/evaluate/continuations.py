"""Bits per byte and perplexity of an encoder-decoder: how well it continues a text that it has read.

    score = continue_source("path/to/t5", ["corpus.txt"])
    print(score.bits_per_byte)

A document is cut into windows; the first half of each is the source, the second half is predicted. The
figures are of those halves alone and compare between encoder-decoders, not with a decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from linspec.checkpoints.hub import check_tokenizer, load_seq2seq, load_tokenizer
from linspec.errors import ConfigError, InputError, NotFinite
from linspec.evaluate.perplexity import Score, held_out_documents
from linspec.evaluate.windows import limited
from linspec.models.t5 import T5
from linspec.train.data import Sources, check_sources
from linspec.utils.messages import now_called
from linspec.utils.progress import Progress

# tokens of one batch of windows
_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class _Window:
    """bytes: those of the target."""

    source: list[int]
    target: list[int]
    bytes: int


def continue_source(
    model: str | Path,
    data: Sources = ("stdlib",),
    *,
    field: str = "text",
    limit_bytes: int | None = None,
    context: int = 512,
    device: str = "cpu",
) -> Score:
    """The score of a T5 directory on `data`; see `evaluate_continuations`, `held_out_documents`."""
    data = check_sources(data)
    loaded, tokenizer = load_seq2seq(model, device=device), load_tokenizer(model)
    check_tokenizer(tokenizer, loaded.config)
    documents = held_out_documents(data, field)
    return evaluate_continuations(
        loaded, tokenizer, documents, context=context, limit_bytes=limit_bytes
    )


@torch.inference_mode()
def evaluate_continuations(
    model: T5,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    context: int = 512,
    limit_bytes: int | None = None,
) -> Score:
    """The score of `model` on the second half of every window of `context` tokens.

    limit_bytes: of text that windows are cut from. What is left of a document is a window too if it
    is longer than half of one. Raises ConfigError for impossible sizes, InputError when no document is
    long enough.
    """
    if context < 2:
        raise ConfigError(f"context must be 2 or more tokens, got {context}")
    if limit_bytes is not None and limit_bytes < 1:
        raise ConfigError(f"limit_bytes must be 1 or more, got {limit_bytes}")
    windows = [
        window
        for text in limited(documents, limit_bytes)
        for window in _windows(tokenizer, text, context)
    ]
    if not windows:
        raise InputError(
            f"no document has more than {context // 2} tokens, half a window; give longer text or a "
            "smaller context"
        )
    windows.sort(key=lambda window: len(window.target), reverse=True)
    nats, rows = 0.0, max(1, _BATCH_TOKENS // context)
    with Progress("eval", len(windows)) as progress:
        for begin in range(0, len(windows), rows):
            batch = windows[begin : begin + rows]
            nats += _nats(model, batch)
            if not math.isfinite(nats):
                raise NotFinite("the losses of the held-out text")
            progress.update(begin + len(batch), f"{len(batch)} windows at a time")
    tokens, size = (sum(found) for found in zip(*map(_sizes, windows), strict=True))
    perplexity = math.exp(nats / tokens) if nats / tokens < 700 else math.inf
    return Score(nats / math.log(2) / size, perplexity, tokens, size)


def _sizes(window: _Window) -> tuple[int, int]:
    return len(window.target), window.bytes


def _windows(tokenizer: Any, text: str, context: int) -> Iterator[_Window]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets, half = encoded["input_ids"], encoded["offset_mapping"], context // 2
    for start in range(0, len(ids) - half, context):
        middle, end = start + half, min(start + context, len(ids))
        # from the end of the token before: offsets leave out the space that a word begins with
        told = text[offsets[middle - 1][1] : offsets[end - 1][1]]
        yield _Window(ids[start:middle], ids[middle:end], len(told.encode()))


def _nats(model: T5, batch: list[_Window]) -> float:
    """Negative log-likelihood of the targets."""
    device = model.device
    source = torch.tensor([window.source for window in batch], device=device)
    target = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(window.target) for window in batch], batch_first=True, padding_value=-1
    ).to(device)
    start = target.new_full((len(batch), 1), model.config.start_id)
    # causal: what stands behind a target cannot change its logits
    logits = model(source, torch.cat((start, target[:, :-1].clamp_min(0)), dim=1))
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), ignore_index=-1, reduction="none"
    )
    return float(losses.double().sum())


if __name__ == "__main__":
    now_called("linspec eval continuations")
