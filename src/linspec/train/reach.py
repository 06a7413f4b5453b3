"""How far each layer must see exactly: measured on the teacher, not guessed.

A few layers copy from far back, most look only near (Olsson et al. 2022, arXiv 2209.11895). A budget
of rows that every layer gets alike is wasted on most of them, so it goes where it lowers the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from linspec.config import MixerConfig
from linspec.errors import ConfigError
from linspec.mixers import MIXERS, Mixer
from linspec.models.decoder import Decoder
from linspec.progress import Progress
from linspec.train.finetune import finetune_loss
from linspec.train.loop import fast_bfloat16
from linspec.train.transfer import mixer_of


def spans_by_need(
    teacher: Decoder,
    mixer: MixerConfig,
    layers: Sequence[int],
    batch: torch.Tensor,
    rows: int,
) -> dict[int, int]:
    """The span of each of `layers` so that they see `rows` tokens exactly in the mean.

    mixer: what the layers become. batch [B, T + 1]: text to measure on. Raises ConfigError when
    `rows` is less than one group.
    """
    if rows < mixer.group:
        raise ConfigError(
            f"{rows} rows a layer are less than one group of {mixer.group} tokens; give more rows "
            "or smaller groups"
        )
    most = -(-(batch.shape[1] - 1) // mixer.group)
    spans = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    losses = []
    with Progress("reach", len(layers)) as progress:
        for done, layer in enumerate(layers, 1):
            measured = [_loss_with(teacher, layer, replace(mixer, span=s), batch) for s in spans]
            losses.append(measured)
            progress.update(done, f"layer {layer}: {measured[0]:.3f} to {measured[-1]:.3f} nats")
    chosen = allocate(losses, spans, len(layers) * rows // mixer.group)
    return dict(zip(layers, chosen, strict=True))


def allocate(losses: Sequence[Sequence[float]], spans: Sequence[int], budget: int) -> list[int]:
    """A span for each layer, in all at most `budget` groups; losses[l][i] is that of spans[i] in l.

    Greedy: the longer span that lowers the loss most for each group it costs, until none fits. Losses
    of several layers are taken to add up.
    """
    chosen, left = [0] * len(losses), budget - len(losses) * spans[0]
    while True:
        best = max(_longer(losses, spans, chosen, left), default=None)
        if best is None or best[0] <= 0:
            return [spans[i] for i in chosen]
        _, layer, i = best
        left -= spans[i] - spans[chosen[layer]]
        chosen[layer] = i


def _longer(
    losses: Sequence[Sequence[float]], spans: Sequence[int], chosen: Sequence[int], left: int
) -> Iterator[tuple[float, int, int]]:
    """What each affordable longer span gains for each group: (gain, layer, index of the span)."""
    for layer, (measured, now) in enumerate(zip(losses, chosen, strict=True)):
        for i in range(now + 1, len(spans)):
            cost = spans[i] - spans[now]
            if cost <= left:
                yield (measured[now] - measured[i]) / cost, layer, i


@torch.no_grad()
def _loss_with(teacher: Decoder, layer: int, mixer: MixerConfig, batch: torch.Tensor) -> float:
    device = batch.device
    with (
        _swapped(teacher, layer, mixer),
        torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)),
    ):
        return float(finetune_loss(teacher, batch))


@contextmanager
def _swapped(teacher: Decoder, layer: int, mixer: MixerConfig) -> Iterator[None]:
    """The teacher with another mixer in one layer, as it is before any training."""
    old = mixer_of(teacher, layer)
    new: Mixer = MIXERS[mixer.name](teacher.config, mixer)
    new.load_state_dict(old.state_dict(), strict=False)
    teacher.blocks[layer].mixer = new.to(old.k.weight)
    try:
        yield
    finally:
        teacher.blocks[layer].mixer = old
