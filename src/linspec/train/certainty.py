"""The loss of dParallel (Chen et al. 2025, arXiv 2509.26488): certainty-forcing distillation.

A masked-diffusion model learns its own answers once more. Half of a span is hidden, and all that stands
behind it; then the other half. Cross entropy keeps the answers, and where the likeliest token is right
already its distribution is made sharper: so many tokens become sure in the same forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.pieces import Entropy, Labels, Output, likeliest, loss_in_pieces, piece_size

# entropies below it count as sure, as the published decoder has it
SURE = 0.5


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt of `begin` tokens and the answer behind it."""

    ids: tuple[int, ...]
    begin: int


class Spans:
    """Batches of texts with a span half hidden, the same for the same seed and step.

    A row for each text, then one for each with the other half hidden. A hidden token t is written as -1 - t;
    what stands behind the span is the mask token, of which nothing is asked. Rows end with `padding`.
    """

    def __init__(
        self, texts: Sequence[Text], mask: int, padding: int, block: int | None, seed: int
    ) -> None:
        """block: tokens of a span, which begin where a decoder's blocks do; None for whole answers."""
        self._texts, self._mask, self._padding = texts, mask, padding
        self._block, self._seed = block, seed

    def batch(self, step: int, rows: int) -> Tensor:
        """[2 · rows, T] of texts drawn at random, without a text twice where there are enough."""
        rng = np.random.default_rng([self._seed, step])
        count = len(self._texts)
        picked = rng.choice(count, rows, replace=rows > count)
        return self.of([self._texts[each] for each in picked], rng)

    def of(self, texts: Sequence[Text], rng: np.random.Generator) -> Tensor:
        """[2N, T] of these texts."""
        halves = [self._halves(each, rng) for each in texts]
        rows = [half for part in zip(*halves, strict=True) for half in part]
        return torch.nn.utils.rnn.pad_sequence(rows, True, self._padding)

    def _halves(self, text: Text, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        length = len(text.ids) - text.begin
        block = self._block or length
        start = text.begin + block * int(rng.integers(-(-length // block)))
        stop = min(start + block, len(text.ids))
        ids = torch.tensor(text.ids)
        asked = ids[start:stop]
        hidden = torch.from_numpy(rng.random(stop - start) < 0.5)
        ids[stop:] = self._mask
        found = []
        for half in (hidden, ~hidden):
            row = ids.clone()
            row[start:stop] = torch.where(half, -1 - asked, asked)
            found.append(row)
        return found[0], found[1]


def _asked(model: MaskedDiffusion, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Final states [N, D] of what a batch of `Spans` hides, the tokens there, and their rows."""
    hidden, real = batch < 0, batch != model.config.vocab_size
    ids = batch.masked_fill(hidden, model.config.mask_id).masked_fill(~real, 0)
    return model.telling(ids, real)[hidden], -1 - batch[hidden], hidden.nonzero()[:, 0]


def certainty_loss(
    model: MaskedDiffusion, batch: Tensor, weight: float = 2.0, temperature: float = 0.5
) -> Tensor:
    """Mean over the texts of a batch of `Spans`, in nats: CE₁ + CE₂ + weight · (H₁ + H₂).

    CE: mean cross entropy of the tokens that one half hides. H: mean entropy, at the temperature, of those of
    them whose likeliest token is right; zero where none is. A wrong one has none: it would become sure of it.
    """
    states, wanted, rows = _asked(model, batch)
    # two rows are one text
    whole = 2 / len(batch)
    labels = Labels(wanted, whole * _shares(torch.ones_like(rows), rows, len(batch)))
    doubt = None
    if weight:
        right = likeliest(states, model.head, model.config.vocab_size) == wanted
        doubt = Entropy(weight * whole * _shares(right, rows, len(batch)), temperature)
    return loss_in_pieces(states, Output.of(model.head), labels, entropy=doubt)


def entropy(logits: Tensor) -> Tensor:
    """[N], in nats, of the distributions of logits [N, vocab]."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _shares(counted: Tensor, rows: Tensor, count: int) -> Tensor:
    """What each token [N] counts in the mean over those of its row, of `count` rows, that are counted."""
    ones = counted.float()
    return ones / ones.new_zeros(count).index_add(0, rows, ones).clamp_min(1)[rows]


@torch.inference_mode()
def certainty(model: MaskedDiffusion, batch: Tensor) -> dict[str, float]:
    """Of what a batch of `Spans` hides: nats a token, which share is sure, and which is sure and right."""
    states, wanted, _ = _asked(model, batch)
    size, found = piece_size(model.config.vocab_size), []
    for part, ids in zip(states.split(size), wanted.split(size), strict=True):
        logits = model.head(part).float()
        sure, right = entropy(logits) <= SURE, logits.argmax(-1) == ids
        nats = F.cross_entropy(logits, ids, reduction="none")
        found.append(torch.stack((nats, sure, sure & right)))
    shares = torch.cat(found, 1).mean(1).tolist()
    return dict(zip(("nats", "sure", "sure_and_right"), shares, strict=True))
