"""Sequence parallelism: several processes train on one window, each on a shard of it (LASP-2, LASP-2H).

    torchrun --nproc-per-node 2 $(which linspec) linearize MODEL --sequence-parallel 2 ...

Paper: Sun et al. 2025, arXiv 2502.07563. What shards tell each other is in `mixers/shards.py`; here is who
holds which tokens, and how the losses of shards become the loss of the window.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
from accelerate import Accelerator

from linspec.errors import ConfigError
from linspec.mixers.carry import Carry
from linspec.mixers.shards import Shard, on_shard
from linspec.models.decoder import Decoder
from linspec.models.model_types import type_of
from linspec.train.compiled import LossFn
from linspec.train.objective import Stack, blocks_of
from linspec.train.process_exchange import ProcessExchange


class SequenceParallel:
    """The processes of a run in groups of `parts`, each group with windows of its own; 1 changes nothing.

    index: of the group. exchange: how its processes tell each other, None for a group of one.

    Raises:
        ConfigError: this run has other processes, or a model cannot be computed in shards.
    """

    def __init__(self, accelerator: Accelerator, parts: int, models: Iterable[Stack]) -> None:
        self.parts, self.models = parts, tuple(models)
        self.index, self.rank = divmod(accelerator.process_index, parts)
        self.exchange: ProcessExchange | None = None
        self._shard: Shard | None = None
        if parts == 1:
            return
        check_processes(accelerator, parts)
        self.unit = shard_unit(self.models)
        # every process takes part in making every group
        groups = [
            dist.new_group(range(first, first + parts))
            for first in range(0, accelerator.num_processes, parts)
        ]
        self.exchange = ProcessExchange(groups[self.index])

    def loss(self, loss_fn: LossFn) -> LossFn:
        """`loss_fn`, a mean over the tokens of windows [B, T + 1], on this process's shard of them.

        Its mean over the processes is the loss of the windows, and so are its gradients.
        """
        if self.exchange is None:
            return loss_fn

        def of_shard(batch: torch.Tensor) -> torch.Tensor:
            with self._on_shard(batch.shape[1] - 1) as shard:
                loss = loss_fn(batch[:, shard.start : shard.end + 1])
            return loss * (self.parts * share(shard))

        return of_shard

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over a window, of the mean over each shard; without a gradient."""
        if self._shard is None or self.exchange is None:
            return x
        total = x.detach() * share(self._shard)
        dist.all_reduce(total, group=self.exchange.group)
        return total

    @contextlib.contextmanager
    def _on_shard(self, tokens: int) -> Iterator[Shard]:
        assert self.exchange is not None
        lengths = split_evenly(tokens, self.parts, self.unit)
        self._shard = Shard(lengths, self.rank, self.exchange)
        try:
            with contextlib.ExitStack() as stack:
                for model in self.models:
                    stack.enter_context(on_shard(model, self._shard))
                yield self._shard
        finally:
            self._shard = None


def share(shard: Shard) -> float:
    """Of the tokens of the sequence, how many the shard holds."""
    return shard.lengths[shard.rank] / sum(shard.lengths)


def split_evenly(tokens: int, parts: int, unit: int) -> tuple[int, ...]:
    """Lengths of `parts` shards that end at multiples of `unit` where there are enough of them.

    Raises ConfigError where a shard would be empty.
    """
    if tokens < parts:
        raise ConfigError(
            f"a window of {tokens} tokens cannot be shared among {parts} processes; choose a longer context "
            "or a smaller sequence_parallel"
        )
    units = -(-tokens // unit)
    if units < parts:
        units, unit = tokens, 1
    borders = [min(tokens, units * i // parts * unit) for i in range(parts + 1)]
    return tuple(end - start for start, end in pairwise(borders))


def check_processes(accelerator: Accelerator, parts: int) -> None:
    """Raise ConfigError unless the processes of this run form groups of `parts`."""
    processes = accelerator.num_processes
    if processes % parts:
        raise ConfigError(
            f"sequence_parallel {parts} needs a multiple of {parts} processes, this run has {processes}; "
            f"start it with torchrun --nproc-per-node {parts}, or leave it out"
        )


def shard_unit(models: Iterable[Stack]) -> int:
    """Tokens at whose multiples shards tell each other least: there the groups of all mixers end.

    Raises ConfigError for a model that is not a decoder, or a mixer that cannot be computed in shards.
    """
    return math.lcm(*(carry.group for model in models for carry in _carries(model)))


def _carries(model: Stack) -> Iterator[Carry]:
    kind = type_of(model)
    if kind.model is not Decoder:
        raise ConfigError(
            f"a model of type {kind.name!r} cannot be shared among processes by its tokens, only a decoder "
            "can; leave out sequence_parallel"
        )
    for block in blocks_of(model):
        for carry in block.mixer.part_carries():
            if carry is None:
                raise ConfigError(
                    f"mixer {block.mixer.mixer.name!r} does not say what a shard of a sequence takes over "
                    "from those before it (its method `carry`); choose another mixer, or leave out "
                    "sequence_parallel"
                )
            yield carry


def uncompiled(compile: str, parts: int) -> str:
    """`compile` for shards, whose steps are not compiled; raises ConfigError where it is 'on'."""
    if parts > 1 and compile == "on":
        raise ConfigError(
            f"steps of a sequence that {parts} processes share are not compiled; leave out compile"
        )
    return "off" if parts > 1 else compile
