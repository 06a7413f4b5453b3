"""The full form over a sequence that several processes share: LASP-2 for linear mixers, LASP-2H for softmax.

Each process holds one shard, neighbouring tokens, and tells the others once what they need of it: a summary
of closed groups, and the entries that are read one by one (Sun et al. 2025, arXiv 2502.07563).

    with on_shard(model, Shard((5, 3), rank=1, exchange=exchange)):
        logits = model(ids[:, 5:])
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from linspec.mixers.carry import Carry, Cut, cut
from linspec.mixers.ops.convolution import convolve

if TYPE_CHECKING:
    from linspec.mixers.base import Mixer

Message = Sequence[torch.Tensor]
# (anchor, own message) -> the anchor, and the messages of all shards. What a shard makes of the anchor must
# reach its loss: through it a shard that reads no message takes part in the backward of the exchange
Exchange = Callable[[torch.Tensor, Message], tuple[torch.Tensor, Sequence[Message]]]


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a sequence that one process holds.

    lengths: tokens of all shards, in their order; rank: which one this is; exchange: tells the others.
    """

    lengths: tuple[int, ...]
    rank: int
    exchange: Exchange

    @property
    def start(self) -> int:
        """Position of its first token."""
        return sum(self.lengths[: self.rank])

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.start + self.lengths[self.rank]


@dataclass(frozen=True, slots=True)
class Before:
    """What lies before a shard.

    keys, values: [B, Hkv, P, .] entries that are read one by one. sums: what the entries before those have
    become, None for nothing. history: the values right before the shard that a convolution reads.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor | None
    history: torch.Tensor


@contextlib.contextmanager
def on_shard(model: nn.Module, shard: Shard) -> Iterator[None]:
    """Within it the full forms of `model` and of all its parts compute this shard of a sequence."""
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "shard")]
    for part in parts:
        part.shard = shard
    try:
        yield
    finally:
        for part in parts:
            part.shard = None


def full_of_shard(
    mixer: Mixer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shard: Shard
) -> torch.Tensor:
    """`forms.full` of one shard, whose tokens have these features: [B, H, T, V].

    q [B, H, T, K'], k [B, Hkv, T, K'] and v [B, Hkv, T, V'].
    """
    carry = mixer.carry()
    assert carry is not None, "the shards of such a mixer know nothing of each other"
    history = max(0, mixer.mixer.taps - 1)
    cuts = cut(carry, shard.lengths, history)
    # nobody comes behind the last shard
    rows = max(each.rows for each in cuts[:-1]) if len(cuts) > 1 else 0
    messages: Sequence[Message] = []
    if rows or carry.older is not None:
        q, messages = shard.exchange(q, _message(carry, k, v, cuts[shard.rank], rows))
    before = _before(carry, (k, v), cuts[: shard.rank], messages, history)
    return _mixed(mixer, q, k, v, before)


def _message(
    carry: Carry, k: torch.Tensor, v: torch.Tensor, own: Cut, rows: int
) -> list[torch.Tensor]:
    """Entries that later shards read one by one, filled up to `rows`, and the summary of the others."""
    head, tail = own.head - own.start, own.tail - own.start
    sent = [torch.cat((x[:, :, :head], x[:, :, tail:]), dim=2)[:, :, :rows] for x in (k, v)]
    sent = [F.pad(x, (0, 0, 0, rows - x.shape[2])) for x in sent]
    if carry.older is not None:
        closed = [x[:, :, head : own.closed - own.start] for x in (k, v)]
        if own.closed == own.head:
            # messages are of one size: this one tells of a group that nobody reads
            closed = [x.new_zeros(*x.shape[:2], carry.group, x.shape[3]) for x in (k, v)]
        sent.append(carry.older.summary(*closed))
    return sent


def _before(
    carry: Carry,
    own: tuple[torch.Tensor, torch.Tensor],
    cuts: Sequence[Cut],
    messages: Sequence[Message],
    history: int,
) -> Before:
    """What the shards `cuts` hand on to the one behind them, whose features are `own`."""
    # entries from position `at` on, and what those before it have become
    entries, at, sums = [x[:, :, :0] for x in own], 0, None
    recent = own[1][:, :, :0]
    for each, message in zip(cuts, messages, strict=False):
        sent = [x[:, :, : each.rows] for x in message[:2]]
        recent = torch.cat((recent, sent[1]), dim=2)
        head = each.head - each.start
        entries = _behind(entries, [x[:, :, :head] for x in sent])
        if each.closed > each.head:
            if carry.older is not None:
                sums = _fold(carry, sums, entries)
                sums = carry.older.joined(sums, message[2], each.closed - each.head)
            at, entries = (
                each.closed,
                [x[:, :, x.shape[2] - (each.end - each.closed) :] for x in sent],
            )
        else:
            entries = _behind(entries, [x[:, :, head:] for x in sent])
    first = carry.first_read(cuts[-1].end) - at if cuts else 0
    sums = _fold(carry, sums, [x[:, :, :first] for x in entries])
    keys, values = (x[:, :, first:] for x in entries)
    recent = recent[:, :, max(0, recent.shape[2] - history) :]
    return Before(keys, values, sums, F.pad(recent, (0, 0, history - recent.shape[2], 0)))


def _behind(first: Message, then: Message) -> list[torch.Tensor]:
    return [torch.cat(pair, dim=2) for pair in zip(first, then, strict=True)]


def _fold(carry: Carry, sums: torch.Tensor | None, entries: Message) -> torch.Tensor | None:
    """Sums after whole groups of entries, which one shard began and another one ended."""
    k, v = entries
    if carry.older is None or not k.shape[2]:
        return sums
    return carry.older.joined(sums, carry.older.summary(k, v), k.shape[2])


def _mixed(
    mixer: Mixer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: Before
) -> torch.Tensor:
    """The two terms of `forms.full` for tokens behind what lies before them."""
    ahead = before.keys.shape[2]
    keys, values = torch.cat((before.keys, k), dim=2), torch.cat((before.values, v), dim=2)
    if ahead and mixer.ends_alone:
        o = mixer.mix_end(q, keys, values)
    else:
        # queries of entries that are another shard's: nobody asks for what they read
        o = mixer.mix(F.pad(q, (0, 0, ahead, 0)), keys, values, before.sums)[:, :, ahead:]
    if mixer.mixer.taps:
        o = o + convolve(v, mixer.taps, mixer.repeats, before.history)[..., : mixer.head_width]
    return o
