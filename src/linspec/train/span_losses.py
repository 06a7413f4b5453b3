"""How far each layer must see exactly: measured on the teacher, not guessed.

A few layers copy from far back, most look only near (Olsson et al. 2022, arXiv 2209.11895). A budget
of exact tokens that every layer gets alike is wasted on most of them, so it goes where it lowers the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from linspec.errors import ConfigError
from linspec.mixers import MIXERS, Mixer
from linspec.mixers.base import Rope
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.train.finetune import finetune_loss
from linspec.train.objective import Predictor
from linspec.train.pieces import Labels, Output, loss_in_pieces
from linspec.train.precision import fast_bfloat16
from linspec.train.transfer import block_of
from linspec.utils.progress import Progress


@dataclass(frozen=True)
class SpanLosses:
    """Loss in nats of the teacher with one layer changed: losses[layer][i] at a span of spans[i]."""

    spans: list[int]
    losses: dict[int, list[float]]

    def spans_by_need(self, groups: int) -> dict[int, int]:
        """A span for each layer, in all at most `groups`; raises ConfigError when they are too few."""
        if groups < len(self.losses):
            raise ConfigError(
                f"{groups} groups are too few for {len(self.losses)} layers; give more "
                "--exact-tokens or a smaller --group"
            )
        chosen = allocate(list(self.losses.values()), self.spans, groups)
        return dict(zip(self.losses, chosen, strict=True))

    def without(self, layers: Iterable[int]) -> SpanLosses:
        """The same but for `layers`."""
        left = set(self.losses) - set(layers)
        return SpanLosses(
            self.spans, {layer: self.losses[layer] for layer in self.losses if layer in left}
        )

    def neediest(self, count: int) -> list[int]:
        """The `count` layers that lose most when they see only near, at two groups or one."""
        near = min(1, len(self.spans) - 1)
        return sorted(self.losses, key=lambda layer: -self.losses[layer][near])[:count]


def tried_spans(context: int, group: int) -> tuple[int, ...]:
    """1, 2, 4, … groups, as far as texts of `context` tokens show."""
    most = -(-context // group)
    return tuple(1 << i for i in range(most.bit_length()) if 1 << i <= most)


def measure_span_losses(
    teacher: Predictor,
    mixer: MixerConfig,
    layers: Sequence[int],
    batch: torch.Tensor,
    *,
    spans: Sequence[int] = (),
    known: Mapping[int, Sequence[float]] | None = None,
    keep: Callable[[Mapping[int, list[float]]], None] = lambda losses: None,
) -> SpanLosses:
    """Swap `mixer` into one of `layers` at a time, at `spans` (all that the text shows if empty).

    batch [B, T + 1]: text to measure on. known: losses that were measured before, a layer's may be
    the first few; keep: is given all losses after every new one.
    """
    measured = SpanLosses(list(spans or tried_spans(batch.shape[1] - 1, mixer.group)), {})
    found = {layer: list((known or {}).get(layer, ())) for layer in layers}
    done, total = sum(map(len, found.values())), len(layers) * len(measured.spans)
    with torch.no_grad(), _precision(batch.device), Progress("spans", total, done) as progress:
        loss = _loss_of(teacher, batch) if done < total else None
        for layer, losses in found.items():
            for span in measured.spans[len(losses) :]:
                assert loss is not None
                with _swapped(teacher, layer, replace(mixer, span=span)):
                    losses.append(loss(layer))
                done += 1
                keep(found)
                progress.update(done, f"layer {layer}: {losses[0]:.3f} to {losses[-1]:.3f} nats")
    measured.losses.update(found)
    return measured


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


def _loss_of(teacher: Predictor, batch: torch.Tensor) -> Callable[[int], float]:
    """The loss when one layer is changed; of a decoder, the layers before it are computed once."""
    if not isinstance(teacher, Decoder):
        return lambda layer: float(finetune_loss(teacher, batch))
    entering, ropes = _states(teacher, batch[:, :-1])
    return lambda layer: _loss_from(teacher, layer, entering[layer], ropes, batch[:, 1:])


def _states(teacher: Decoder, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[Rope]]:
    """What enters every layer, [B, T, D] each, and the rotation of the positions there."""
    x, ropes = teacher.enter(ids, torch.arange(ids.shape[1], device=ids.device))
    entering = []
    for block, rope in zip(teacher.layers, ropes, strict=True):
        entering.append(x)
        x = block(x, rope)
    return entering, ropes


def _loss_from(
    teacher: Decoder, layer: int, x: torch.Tensor, ropes: list[Rope], labels: torch.Tensor
) -> float:
    """Mean nats of labels [B, T] from what enters `layer`; what is before it does not change."""
    for block, rope in zip(teacher.layers[layer:], ropes[layer:], strict=True):
        x = block(x, rope)
    return float(loss_in_pieces(teacher.leave(x), Output.of(teacher.head), Labels(labels)))


def _precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


@contextmanager
def _swapped(teacher: Predictor, layer: int, mixer: MixerConfig) -> Iterator[None]:
    """The teacher with another mixer in one layer, as it is before any training."""
    block = block_of(teacher, layer)
    old = block.mixer
    new: Mixer = MIXERS[mixer.name](old.config, mixer)
    new.load_state_dict(old.state_dict(), strict=False)
    block.mixer = new.to(old.k.weight)
    try:
        yield
    finally:
        block.mixer = old
