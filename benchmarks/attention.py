"""How fast attention reads a cache: a decoder in which it is all there is, on one thread.

    python -m benchmarks.attention                      # the best instruction set of this processor
    LINSPEC_CPU_KERNELS=avx2 python -m benchmarks.attention

A step of one new token reads the whole cache, and one of a tree of 8 reads it once for all of them. Times
are processor time, the least of many short steps, so that they survive a machine that others use too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from linspec.decoding.step import StepInput
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder

KINDS = ("float", "float16", "bfloat16", "int8", "int4")
_LAYERS, _KV_HEADS = 4, 3


@dataclass(frozen=True, slots=True)
class Speed:
    """One kind of cache under heads of one form: seconds of a step of one node and of a tree."""

    kind: str
    width: int
    group: int
    cache_bytes: int
    seconds: float
    tree_seconds: float

    @property
    def gb_per_s(self) -> float:
        """Of the cache, in a step of one node."""
        return self.cache_bytes / self.seconds / 1e9

    def __str__(self) -> str:
        return (
            f"{self.kind:9} {self.width:4} features, {self.group} heads a KV head: "
            f"{1e3 * self.seconds:7.2f} ms, {self.gb_per_s:5.1f} GB/s, "
            f"8 nodes ÷ 1: {self.tree_seconds / self.seconds:.2f}"
        )


def speeds(
    *,
    widths: Sequence[int] = (64, 128),
    groups: Sequence[int] = (1, 3, 4, 8),
    context: int = 4096,
    repeats: int = 40,
    clock: Callable[[], float] = time.process_time,
) -> Iterator[Speed]:
    """Every kind of cache for every form of heads; one thread, which the caller sees to."""
    for width in widths:
        for group in groups:
            model = _decoder(width, group, context)
            for kind in KINDS:
                yield _speed(model, kind, context, repeats, clock)


def _decoder(width: int, group: int, context: int) -> Decoder:
    config = DecoderConfig(
        vocab_size=64,
        width=32,
        layers=_LAYERS,
        heads=_KV_HEADS * group,
        kv_heads=_KV_HEADS,
        head_width=width,
        mlp_width=32,
        max_positions=context + 8,
    )
    torch.manual_seed(0)
    return Decoder(config).to_inference()


def _speed(
    model: Decoder, kind: str, context: int, repeats: int, clock: Callable[[], float]
) -> Speed:
    state = model.new_state(1, kind)
    tokens = [index * 31 % 64 for index in range(context)]
    model.step([StepInput(0, tokens, all_logits=False)], state)
    state.commit(0, range(context))
    steps = (StepInput(0, [1]), StepInput(0, [1] * 8, [-1, 0, 0, 1, 1, 2, 2, 3]))
    best = [float("inf")] * len(steps)
    # in turns, so that a slow moment meets both
    for _ in range(repeats):
        for index, step in enumerate(steps):
            began = clock()
            model.step([step], state)
            best[index] = min(best[index], max(clock() - began, 1e-9))
            state.drop(0)
    config = model.config
    group = config.heads // config.kv_heads
    return Speed(kind, config.head_width, group, state.bytes(0), *best)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_decoder(64, 1, 8).kernels)
    for speed in speeds():
        print(speed, flush=True)
