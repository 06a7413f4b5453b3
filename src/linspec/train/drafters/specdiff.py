"""SpecDiff-2 in training (arXiv 2511.00606): a diffusion model learns to draft what its target accepts.

Streak distillation makes the expected length of the accepted streak large. A window is read in rounds of a
few tokens, as the engine will; all rounds go through the drafter together, and each learns the target's
choices and distributions behind the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch

from linspec.checkpoints.hub import load_decoder
from linspec.checkpoints.resolve import resolve
from linspec.drafters.specdiff_net import SpecDiffNet, hidden_in_rounds
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import RANKS, TRAININGS, DrafterTraining, check_length
from linspec.train.drafters.states import TargetStates, states_of
from linspec.train.drafters.walk import Prediction, Walk
from linspec.utils.messages import shown
from linspec.utils.options import option
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_positive, check_sizes

# what is made small, see `streak_loss`
OBJECTIVES = ("ce-streak", "streak", "ce")
# logarithm of the share of what a drafter cannot say
LEAST = -30.0
# places of a window that are drafted from at once when it is measured
_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class SpecDiffTrainingOptions:
    """Where the drafter starts from, its shape, and what it learns."""

    model: str | None = option(
        "the diffusion model to start from; none is the target itself with a mask token",
        default=None,
        short=True,
    )
    places: int = option("tokens that a draft guesses at once", default=4)
    layers: int = option("layers to keep of the model, spread evenly; 0 is all", default=0)
    objective: str = option("ce-streak, streak or ce", default="ce-streak")
    warm: float = option("weight of drafts that no streak reaches yet, beside those", default=0.2)
    soft: float = option("weight of the target's distribution beside its choice", default=0.5)

    def __post_init__(self) -> None:
        check_sizes(self, "places")
        check_sizes(self, "layers", least=0)
        for name in ("warm", "soft"):
            check_positive(name, getattr(self, name), zero=True)
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {shown(repr(self.objective))}"
            )


@TRAININGS.register(
    "specdiff",
    summary="a masked-diffusion model learns to draft long accepted streaks of its target",
    paper="Sandler et al. 2025 (SpecDiff-2), arXiv 2511.00606",
    options=SpecDiffTrainingOptions,
)
class SpecDiffTraining(DrafterTraining[SpecDiffNet]):
    """All weights of the diffusion model learn; the target stays as it is."""

    options: SpecDiffTrainingOptions
    lr = 8e-4

    def __init__(self, options: SpecDiffTrainingOptions) -> None:
        super().__init__(options)
        self._target: tuple[Decoder, ...] = ()

    @property
    def ahead(self) -> int:
        return self.options.places + 1

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> SpecDiffNet:
        self._target = (target,)
        start = target
        if self.options.model is not None:
            start = load_decoder(resolve(self.options.model), device=str(target.device))
        options, tokens = self.options, target.config.vocab_size
        if start.config.vocab_size < tokens:
            raise ConfigError(
                f"{options.model} has {start.config.vocab_size} tokens, the target {tokens}: both must share "
                "one tokenizer"
            )
        return SpecDiffNet.starting_from(start, tokens, options.places, options.layers)

    def loss(self, drafter: SpecDiffNet, states: TargetStates) -> torch.Tensor:
        # the rounds of each text are others, and a graph for each would be compiled
        plain: Any = torch.compiler.disable(rounds_loss)
        found: torch.Tensor = plain(drafter, states, self.options)
        return found

    @torch.inference_mode()
    def measure(
        self, drafter: SpecDiffNet, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction:
        (target,) = self._target
        length = min(len(stream), max(tokens, context))
        context = min(context, length)
        check_length(context - 1, self.options.places, self.name)
        ranks = min(RANKS, drafter.vocab_size)
        walk = Walk(self.options.places, ranks)
        starts = range(0, length - context + 1, context)
        with Progress("measure the drafter", len(starts)) as progress:
            for done, start in enumerate(starts, 1):
                ids = torch.from_numpy(stream[start : start + context].astype(np.int64))
                ids = ids.to(target.device)
                states = states_of(target, ids[None])
                walk.add(ids, states.chosen[0], guesses(drafter, ids[:-1], ranks))
                progress.update(done)
        drafter.accuracies = walk.rates()
        return walk.prediction()


def rounds_loss(
    drafter: SpecDiffNet, states: TargetStates, options: SpecDiffTrainingOptions
) -> torch.Tensor:
    """The loss of the rounds in which a window is read; the same ones whenever it comes again."""
    ids = states.ids
    generator = torch.Generator().manual_seed(crc32(ids.cpu().numpy().tobytes()))
    ends = rounds_of(states.chosen.shape[1], options.places, generator).to(ids.device)
    logits = drafter.logits(drafts_behind(drafter, ids, ends))
    judged = ends[:, None] + torch.arange(options.places, device=ids.device)
    labels, log_shares = states.chosen[:, judged], logits.log_softmax(-1).clamp(min=LEAST)
    right = log_shares.gather(-1, labels[..., None])[..., 0]
    found = streak_loss(right, options.objective, options.warm)
    if not options.soft:
        return found
    with torch.no_grad():
        theirs = states.target.head(states.final[:, judged]).float().softmax(-1)
    distance = -(theirs * log_shares).sum(-1)
    if options.objective == "ce":
        return found + options.soft * distance.sum(-1).mean()
    return found + options.soft * weighed(distance, right, options.warm)


def rounds_of(length: int, places: int, generator: torch.Generator) -> torch.Tensor:
    """The last token of each round, [R], of a window that has states of `length` tokens.

    Half of the windows begin with a prompt; later rounds read 1 to `places` + 1 tokens, half as often for
    each token more. Behind the last one there are states for all of its drafts.
    """
    last = length - places
    draws = torch.rand(length + 2, generator=generator)
    prompt = int(draws[0] * last) if draws[1] < 0.5 else 0
    read = (1 - draws[2:].log2()).floor().clamp(1, places + 1).long()
    ends = prompt + read.cumsum(0) - read[0]
    return ends[ends <= last]


def drafts_behind(drafter: SpecDiffNet, ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """States [B, R, places, D] that say the drafts behind each of `ends`."""
    model = drafter.denoiser
    return hidden_in_rounds(model, ids, ends, drafter.places - model.config.logit_shift)


def streak_loss(right: torch.Tensor, objective: str, warm: float = 0.0) -> torch.Tensor:
    """What is made small, of the log-probabilities [..., G] of the target's choices.

    'streak': -Σ_j Π_{i≤j} q_i, the expected accepted streak. Its gradient is lost where q_1 is small;
    'ce-streak' weighs the cross entropy of each draft by how likely a streak reaches it, and by `warm` beside
    that. 'ce' weighs all alike.
    """
    if objective == "streak":
        return -right.cumsum(-1).exp().sum(-1).mean()
    if objective == "ce":
        return -right.sum(-1).mean()
    return weighed(-right, right, warm)


def weighed(each: torch.Tensor, right: torch.Tensor, warm: float) -> torch.Tensor:
    """Σ_i (Π_{m<i} q_m + warm) · each_i in the mean, all [..., G]; no gradient goes through the weights."""
    reach = (right.cumsum(-1) - right).exp().detach()
    return (each * (reach + warm)).sum(-1).mean()


def guesses(drafter: SpecDiffNet, ids: torch.Tensor, ranks: int) -> torch.Tensor:
    """The `ranks` likeliest tokens [T - 1, places, ranks] of drafts behind each of ids [T] but the first.

    Each text is read token by token, a round for each, as it is where nothing is accepted.
    """
    found = []
    for first in range(1, len(ids), _TOGETHER):
        ends = torch.arange(first, min(first + _TOGETHER, len(ids)), device=ids.device)
        # the text before is read as a prompt
        hidden = drafts_behind(drafter, ids[None], ends)[0]
        found.append(drafter.logits(hidden).topk(ranks, dim=-1).indices)
    return torch.cat(found)
