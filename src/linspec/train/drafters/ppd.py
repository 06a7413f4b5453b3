"""Prompt tokens in training (Chen et al. 2024, arXiv 2405.18628)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from linspec.decoding.probes import Probes
from linspec.decoding.step import MAX_STAGED
from linspec.decoding.tree import chain
from linspec.drafters.ppd import PromptsConfig, PromptTokens
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS, DrafterTraining
from linspec.train.drafters.chains import cut_of, divergence, hidden_behind
from linspec.train.drafters.counted_hits import count_hits, probe_parents
from linspec.train.drafters.states import TargetStates
from linspec.train.drafters.walk import Prediction, Walk
from linspec.utils.options import option
from linspec.utils.sizes import check_positive, check_sizes


@dataclass(frozen=True, slots=True)
class PPDTrainingOptions:
    """How many prompt tokens, and how their losses are weighed."""

    prompts: int = option("prompt tokens, each for one more token ahead", default=3)
    decay: float = option("the loss of prompt i is weighed by decay^i", default=0.8)

    def __post_init__(self) -> None:
        check_sizes(self, "prompts")
        check_positive("decay", self.decay)


@TRAININGS.register(
    "ppd",
    summary="prompt tokens behind a text, which guess what follows it",
    paper="Chen et al. 2024, arXiv 2405.18628",
    options=PPDTrainingOptions,
)
class PPDTraining(DrafterTraining[PromptTokens]):
    """Each window is cut somewhere; behind the cut every prompt learns the target's own distribution.

    Windows teach one cut each, so many short windows (`context`) teach more than a few long ones.
    """

    options: PPDTrainingOptions
    lr = 1e-2

    def __init__(self, options: PPDTrainingOptions) -> None:
        super().__init__(options)
        self._target: tuple[Decoder, ...] = ()

    @property
    def ahead(self) -> int:
        return self.options.prompts

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> PromptTokens:
        config = target.config
        shape = PromptsConfig(
            width=config.width, vocab_size=config.vocab_size, prompts=self.options.prompts
        )
        drafter, self._target = PromptTokens(shape), (target,)
        # near the middle of what the target knows: prompts from nowhere can diverge
        table = target.embed.weight.detach().float().cpu()
        noise = torch.randn(
            shape.prompts, shape.width, generator=torch.Generator().manual_seed(seed)
        )
        with torch.no_grad():
            drafter.embeddings.copy_(table.mean(0) + 0.1 * table.std(0) * noise)
        return drafter

    def loss(self, drafter: PromptTokens, states: TargetStates) -> torch.Tensor:
        return prompts_loss(drafter, states, self.options.decay)

    def measure(
        self, drafter: PromptTokens, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction:
        (target,) = self._target
        walk, sizes = Walk(drafter.config.prompts, 1), {"context": context, "tokens": tokens}
        drafter.accuracies = calibrate(target, drafter, stream, walk=walk, **sizes)
        return walk.prediction()


def prompts_loss(drafter: PromptTokens, states: TargetStates, decay: float) -> torch.Tensor:
    """(1/m) · Σ_i decay^(i-1) · KL(target i places behind the cut ‖ prompt i)."""
    count, ids = drafter.config.prompts, states.ids
    cut = cut_of(ids, states.final.shape[1] - count)
    hidden = hidden_behind(states.target, ids[:, :cut], drafter.embeddings)
    # the place before the cut says the token behind it, which is the root of a draft
    return divergence(states.target, hidden, states.final[:, cut : cut + count], decay)


def calibrate(
    target: Decoder,
    drafter: PromptTokens,
    stream: np.ndarray,
    *,
    context: int,
    tokens: int,
    walk: Walk | None = None,
) -> list[list[float]]:
    """How often the rank-k guess of prompt i is the target's choice, counted in the steps that serve."""
    prompts, count = drafter.embeddings.to(target.dtype), drafter.config.prompts
    size = max(1, MAX_STAGED // (1 + count))

    def guesses(window: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        state, found = target.new_state(), list[torch.Tensor]()
        for piece in window.split(size):
            tree, nodes = chain(piece.tolist()), len(piece)
            parents = probe_parents(nodes, count)[nodes:]
            probes = Probes(parents, prompts.repeat(nodes, 1))
            logits = target.step([probes.beside(tree, 0, target.embed)], state).logits
            state.commit(0, range(nodes))
            best = logits[nodes:].topk(ranks, dim=-1).indices
            found.append(torch.cat((logits[:nodes].argmax(-1)[:, None], best.view(nodes, -1)), 1))
        whole = torch.cat(found)
        return whole[:, 0], whole[:, 1:].view(-1, count, ranks)

    return count_hits(
        target,
        guesses,
        stream,
        depths=count,
        kind=drafter.kind,
        context=context,
        tokens=tokens,
        walk=walk,
    )
