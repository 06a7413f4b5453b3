"""The maps of hidden transfer in training (Wu et al. 2024, arXiv 2404.12022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from linspec.decoding.step import MAX_STAGED, StepInput
from linspec.drafters.hidden_transfer import TransferConfig, TransferMaps, entering
from linspec.errors import ConfigError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS, DrafterTraining
from linspec.train.drafters.chains import cut_of, divergence, upper_hidden
from linspec.train.drafters.counted_hits import count_hits, probe_parents
from linspec.train.drafters.states import TargetStates, states_of
from linspec.train.drafters.walk import Prediction, Walk
from linspec.utils.options import option
from linspec.utils.sizes import check_positive, check_sizes


@dataclass(frozen=True, slots=True)
class TransferTrainingOptions:
    """Where pseudo states are made, how many, and how their losses are weighed."""

    steps: int = option("pseudo tokens, each for one more token ahead", default=3)
    layer: int | None = option(
        "behind which layer they are made; none is three quarters up", default=None
    )
    rooted: bool = option("maps see the token that the draft begins behind", default=True)
    decay: float = option("the loss of pseudo token i is weighed by decay^i", default=0.8)

    def __post_init__(self) -> None:
        check_sizes(self, "steps")
        check_positive("decay", self.decay)
        if self.layer is not None:
            check_sizes(self, "layer", least=0)

    def layer_of(self, target: DecoderConfig) -> int:
        """The layer of a target behind which pseudo states are made."""
        found = 3 * target.layers // 4 - 1 if self.layer is None else self.layer
        if not 0 <= found < target.layers - 1:
            raise ConfigError(
                f"pseudo states behind layer {found} need layers above it, and this model has "
                f"{target.layers}, numbered from 0; give a layer from 0 to {target.layers - 2}"
                if target.layers > 1
                else "pseudo states go through the upper layers of a model, and this one has a single layer"
            )
        return found


@TRAININGS.register(
    "hidden-transfer",
    summary="maps from a layer's state to those of the next tokens",
    paper="Wu et al. 2024, arXiv 2404.12022",
    options=TransferTrainingOptions,
)
class TransferTraining(DrafterTraining[TransferMaps]):
    """Each window is cut somewhere; pseudo tokens behind the cut learn the target's own distributions.

    Windows teach one cut each, so many short windows (`context`) teach more than a few long ones.
    """

    options: TransferTrainingOptions
    lr = 1e-3

    @property
    def ahead(self) -> int:
        return self.options.steps

    def reads(self, target: DecoderConfig) -> tuple[int, ...]:
        return (self.options.layer_of(target),)

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> TransferMaps:
        config = target.config
        shape = TransferConfig(
            width=config.width,
            vocab_size=config.vocab_size,
            steps=self.options.steps,
            layer=self.options.layer_of(config),
            rooted=self.options.rooted,
        )
        maps = TransferMaps(shape, target)
        maps.initialize()
        return maps

    def loss(self, drafter: TransferMaps, states: TargetStates) -> torch.Tensor:
        return transfer_loss(drafter, states, self.options.decay)

    def measure(
        self, drafter: TransferMaps, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction:
        walk, sizes = Walk(drafter.config.steps, 1), {"context": context, "tokens": tokens}
        drafter.accuracies = calibrate(drafter, stream, walk=walk, **sizes)
        return walk.prediction()


def transfer_loss(drafter: TransferMaps, states: TargetStates, decay: float) -> torch.Tensor:
    """(1/m) · Σ_i decay^(i-1) · KL(target i places behind the cut ‖ pseudo token i)."""
    count, layer = drafter.config.steps, drafter.config.layer
    cut = cut_of(states.ids, states.final.shape[1] - count)
    text = states.layers[layer][:, :cut]
    pseudo = drafter(text[:, -1], states.ids[:, cut])
    hidden = upper_hidden(states.target, text, pseudo, first=layer + 1)
    return divergence(states.target, hidden, states.final[:, cut : cut + count], decay)


def calibrate(
    drafter: TransferMaps,
    stream: np.ndarray,
    *,
    context: int,
    tokens: int,
    walk: Walk | None = None,
) -> list[list[float]]:
    """How often the rank-k guess of pseudo token i is the target's choice, counted in steps that serve."""
    target, count, layer = drafter.target, drafter.config.steps, drafter.config.layer

    def guesses(window: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        # behind the last token nothing is known, and nothing is asked there
        states = states_of(target, torch.cat((window, window[-1:]))[None], (layer,))
        text = states.layers[layer][0]
        hidden = _served(drafter, text, drafter(text, window.roll(-1)))
        best = target.head(hidden).topk(ranks, dim=-1).indices
        return states.chosen[0], best.view(len(window), count, ranks)

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


def _served(drafter: TransferMaps, text: torch.Tensor, pseudo: torch.Tensor) -> torch.Tensor:
    """Final states [T m, D] of pseudo states [T, m, D] behind each place of a text [T, D]."""
    target, count, upper = drafter.target, drafter.config.steps, drafter.upper
    state, size, found = target.new_state(layers=upper), max(1, MAX_STAGED // (1 + count)), []
    for first in range(0, len(text), size):
        real, more = text[first : first + size], pseudo[first : first + size].flatten(0, 1)
        nodes = len(real)
        places = [first + node for node in range(nodes)]
        places += [at + i + 1 for at in places for i in range(count)]
        given = entering(target, torch.cat((real, more)), places)
        tree = StepInput(0, (0,) * len(places), probe_parents(nodes, count), embeddings=given)
        found.append(target.step([tree], state, layers=upper).hidden[nodes:])
        state.commit(0, range(nodes))
    return torch.cat(found)
