"""How the processes that share a sequence tell each other of their shards: one gather, differentiable.

Forward gathers the messages of all, backward sends each its gradients and adds them up: the prefix sums of
one pass are the suffix sums of the other. Gloo and NCCL have both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from linspec.mixers.shards import Message


class ProcessExchange:
    """The exchange of one group of processes, its shards in the order of their ranks.

    gathers, sent: how many gathers there were, forward and backward, and the bytes that this process gave to
    each of the others.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.gathers = self.sent = 0

    def __call__(
        self, anchor: torch.Tensor, message: Message
    ) -> tuple[torch.Tensor, Sequence[Message]]:
        anchor, *found = _Exchange.apply(self, anchor, *message)  # type: ignore[no-untyped-call]  # torch's
        return anchor, [found[i : i + len(message)] for i in range(0, len(found), len(message))]

    def gather(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """The bytes of all processes, equally many of each."""
        found = [torch.empty_like(packed) for _ in range(self.size)]
        dist.all_gather(found, packed, group=self.group)
        self._count(packed)
        return found

    def scatter(self, packed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The bytes that every process has for this one; packed: those for every process, equally many."""
        given = torch.stack(list(packed))
        found = torch.empty_like(given)
        dist.all_to_all_single(found, given, group=self.group)
        self._count(given[0])
        return list(found)

    def _count(self, packed: torch.Tensor) -> None:
        self.gathers += 1
        self.sent += packed.numel()


class _Exchange(torch.autograd.Function):
    """(anchor, message) -> (anchor, tensors of the first message, of the second, ...).

    The anchor is there for the backward: autograd would not come by where no message is read, and the others
    would wait for that process for ever.
    """

    @staticmethod
    def forward(
        ctx: Any, exchange: ProcessExchange, anchor: torch.Tensor, *message: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange = exchange
        found = exchange.gather(_packed(message))
        return anchor.view_as(anchor), *(x for each in found for x in _unpacked(each, message))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, anchor: torch.Tensor, *slopes: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        count = len(slopes) // ctx.exchange.size
        each = [slopes[i : i + count] for i in range(0, len(slopes), count)]
        found = ctx.exchange.scatter([_packed(tensors) for tensors in each])
        mine = zip(*(_unpacked(packed, each[0]) for packed in found), strict=True)
        return None, anchor, *(torch.stack(parts).sum(0) for parts in mine)


def _packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of them as bytes: their dtypes differ, and a gather has one."""
    # copies: one number that autograd expanded counts as contiguous, with a stride that has no bytes
    whole = (x.flatten().clone(memory_format=torch.contiguous_format) for x in tensors)
    return torch.cat([x.view(torch.uint8) for x in whole])


def _unpacked(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of `_packed`, of the shapes and dtypes of `like`."""
    pieces = packed.split([x.numel() * x.element_size() for x in like])
    # a copy begins where its dtype may begin
    return [x.clone().view(y.dtype).view(y.shape) for x, y in zip(pieces, like, strict=True)]
