"""Routers of FiRST in training (Jain et al. 2024, arXiv 2410.12513), phase one: the model stays as it is.

Of each layer a share passes, p·layer(x) + (1 - p)·x, where p is the mean of its router over the window: what
is decided for a whole sequence is learnt for a whole sequence. The paper mixes token by token. Its second
phase, low-rank weights that make up for the layers that are gone, is for decoding without verification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from linspec.drafters.routers import Routers, RoutersConfig
from linspec.mixers.base import Rope
from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS, DrafterTraining
from linspec.train.drafters.states import TargetStates
from linspec.train.pieces import Labels, Output, loss_in_pieces
from linspec.utils.options import option
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_positive, check_sizes


@dataclass(frozen=True, slots=True)
class FirstTrainingOptions:
    """How many layers are to stay, and how much that counts."""

    keep: float = option("share of the layers that a draft is to keep", default=0.75)
    read: int = option("newest tokens of a prompt that routers read", default=64)
    alpha: float = option("weight of the square by which the kept share misses", default=10.0)
    sparse: float = option("weight of shares that are neither 0 nor 1", default=0.1)

    def __post_init__(self) -> None:
        check_sizes(self, "read")
        for name in ("keep", "alpha", "sparse"):
            check_positive(name, getattr(self, name), zero=name != "keep")


@TRAININGS.register(
    "first",
    summary="a router for each layer: which layers a prompt does not need",
    paper="Jain et al. 2024, arXiv 2410.12513",
    options=FirstTrainingOptions,
)
class FirstTraining(DrafterTraining[Routers]):
    """Routers learn which layers can go without changing the target's own choice."""

    options: FirstTrainingOptions
    lr = 2e-2

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> Routers:
        shape = target.config
        config = RoutersConfig(
            width=shape.width,
            vocab_size=shape.vocab_size,
            layers=shape.layers,
            read=self.options.read,
        )
        return Routers(config, target)

    def loss(self, drafter: Routers, states: TargetStates) -> torch.Tensor:
        options = self.options
        shares: list[torch.Tensor] = []

        def gate(layer: int, x: torch.Tensor) -> torch.Tensor:
            shares.append(drafter.shares(layer, x).mean(1))
            return shares[-1]

        hidden = routed(states.target, states.ids[:, :-1], gate)
        right = loss_in_pieces(hidden, Output.of(states.target.head), Labels(states.chosen))
        # of the layers that may go
        open_ones = torch.stack(shares[1:-1]).float()
        missed = (open_ones.mean(0) - self._open_share(drafter)).square().mean()
        undecided = (open_ones * (1 - open_ones)).mean()
        return right + options.alpha * missed + options.sparse * undecided

    def _open_share(self, drafter: Routers) -> float:
        """The share to keep of the layers between the first and the last."""
        layers = drafter.config.layers
        return max(0.0, self.options.keep * layers - 2) / (layers - 2)

    @torch.inference_mode()
    def measure(self, drafter: Routers, stream: np.ndarray, *, context: int, tokens: int) -> None:
        drafter.agreement = agreement(drafter, stream, context=context, tokens=tokens)


def routed(
    target: Decoder, ids: torch.Tensor, gate: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Final hidden states [B, T, D] of ids [B, T] where a share of each layer passes.

    gate: of a layer's number and what enters it [B, T, D], the share [B] of it.
    """
    number = iter(range(target.config.layers))

    def through(block: Block, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        share = gate(next(number), x)[:, None, None].to(x.dtype)
        return share * block(x, rope) + (1 - share) * x

    return target.hidden(ids, through)


@torch.inference_mode()
def agreement(routers: Routers, stream: np.ndarray, *, context: int, tokens: int) -> float:
    """How often a draft's likeliest token is the target's choice, as drafts are made.

    Of consecutive windows of `context` tokens, `tokens` in all, the first half is the prompt that decides.
    """
    target, right, seen = routers.target, 0, 0
    length = min(len(stream), max(tokens, context))
    context = min(context, length)
    half = max(1, context // 2)
    starts = range(0, length - context + 1, context)
    with Progress("measure routers", len(starts)) as progress:
        for done, start in enumerate(starts, 1):
            window = stream[start : start + context].astype(np.int64)
            skipped = routers.skipped(routers.needed(target, window[:half].tolist()))
            ids = torch.from_numpy(window)[None].to(target.device)
            drafted = routed(target, ids, partial(_hard, skipped))[:, half:]
            chosen = target.head(target.hidden(ids)[:, half:]).argmax(-1)
            right += int((target.head(drafted).argmax(-1) == chosen).sum())
            seen += chosen.numel()
            progress.update(done)
    return round(right / max(1, seen), 4)


def _hard(skipped: frozenset[int], layer: int, x: torch.Tensor) -> torch.Tensor:
    return x.new_full((len(x),), float(layer not in skipped))
