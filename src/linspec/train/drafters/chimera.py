"""The network of Chimera in training (Zeng et al. 2024, arXiv 2402.15758)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from linspec.drafters.chimera_net import TOKENS, ChimeraConfig, ChimeraNet
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS, DrafterTraining
from linspec.train.drafters.chains import cut_of
from linspec.train.drafters.counted_hits import count_hits
from linspec.train.drafters.medusa import commonest, places_of
from linspec.train.drafters.states import TargetStates, states_of
from linspec.train.drafters.walk import Prediction, Walk
from linspec.train.pieces import Labels, Output, loss_in_pieces
from linspec.utils.options import option
from linspec.utils.sizes import check_positive, check_sizes

# a draft is learnt behind every so-manieth place of a window
_STRIDE = 4


@dataclass(frozen=True, slots=True)
class ChimeraTrainingOptions:
    """The shape of the network, and how its losses are weighed."""

    depth: int = option("tokens of the deepest draft", default=4)
    heads: int = option("attention heads of its layer", default=4)
    head_width: int = option("features of a head", default=32)
    inner: int = option("inner width of its MLP", default=512)
    window: int = option("how many places back its layer sees", default=32)
    vocabulary: int = option("draft the commonest tokens only; 0 is all", default=0)
    decay: float = option("the loss of depth d is weighed by decay^d", default=0.8)
    state_weight: float = option("weight of the distance to the target's own states", default=0.1)

    def __post_init__(self) -> None:
        check_sizes(self, "depth heads head_width inner window")
        check_sizes(self, "vocabulary", least=0)
        check_positive("decay", self.decay)
        check_positive("state_weight", self.state_weight, zero=True)

    def shape_for(self, target: DecoderConfig) -> ChimeraConfig:
        """The shape of the network that is trained for a target."""
        return ChimeraConfig(
            width=target.width,
            vocab_size=target.vocab_size,
            depth=self.depth,
            heads=self.heads,
            head_width=self.head_width,
            inner=self.inner,
            window=self.window,
            vocabulary=min(self.vocabulary, target.vocab_size),
        )


@TRAININGS.register(
    "chimera",
    summary="one layer over the target's last states and the newest tokens",
    paper="Zeng et al. 2024, arXiv 2402.15758",
    options=ChimeraTrainingOptions,
)
class ChimeraTraining(DrafterTraining[ChimeraNet]):
    """Behind every few places of a window a draft of the window's own tokens learns the target's choices."""

    options: ChimeraTrainingOptions
    lr = 1e-3

    @property
    def ahead(self) -> int:
        return self.options.depth + _STRIDE

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> ChimeraNet:
        shape = self.options.shape_for(target.config)
        drafted = commonest(stream, shape.vocabulary, shape.vocab_size)
        net = ChimeraNet(shape, target, drafted=drafted)
        net.initialize(torch.Generator().manual_seed(seed))
        return net

    def loss(self, drafter: ChimeraNet, states: TargetStates) -> torch.Tensor:
        return chimera_loss(drafter, states, self.options.decay, self.options.state_weight)

    def measure(
        self, drafter: ChimeraNet, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction:
        walk, sizes = Walk(drafter.config.depth, 1), {"context": context, "tokens": tokens}
        drafter.accuracies = calibrate(drafter, stream, walk=walk, **sizes)
        return walk.prediction()


def chimera_loss(
    net: ChimeraNet, states: TargetStates, decay: float, state_weight: float
) -> torch.Tensor:
    """Σ_d decay^d · CE of depth d on the target's choice, and the distance of what the layer makes to the
    target's own states."""
    depth, length = net.config.depth, states.final.shape[1]
    # short ones too: a drafter that was not asked for some rounds begins anew
    width = cut_of(states.ids, min(net.config.window, length - depth - _STRIDE + 1))
    first = width - 2 + cut_of(states.ids, _STRIDE)
    cuts = torch.arange(first, length - depth, _STRIDE, device=states.ids.device)
    found = drafted_states(net, states.final, features_of(net, states.ids), cuts, width)
    chosen = places_of(states.chosen, net.drafted, net.config.vocab_size)
    output, loss = _output(net), found.new_zeros((), dtype=torch.float32)
    for d in range(depth):
        joined = net.joined(states.final[:, cuts], found[:, :, d], d)
        labels = Labels(chosen[:, cuts + 1 + d])
        loss = loss + decay**d * loss_in_pieces(joined, output, labels)
    if state_weight:
        ahead = cuts[:, None] + 1 + torch.arange(depth, device=cuts.device)
        loss = loss + state_weight * F.mse_loss(found.float(), states.final[:, ahead].float())
    return loss


def _output(net: ChimeraNet) -> Output:
    """What `ChimeraNet.logits` is computed by."""
    if net.drafted is None:
        return Output.of(net.target.head)
    return Output(net.target.head.weight[net.drafted.long()])


def features_of(net: ChimeraNet, ids: torch.Tensor) -> torch.Tensor:
    """Features [B, T, D] of every place of ids [B, T]; before the first token that token is repeated."""
    before = ids[:, :1].expand(-1, TOKENS - 1)
    return net.features(torch.cat((before, ids), 1).unfold(1, TOKENS, 1))


def drafted_states(
    net: ChimeraNet, final: torch.Tensor, features: torch.Tensor, cuts: torch.Tensor, width: int
) -> torch.Tensor:
    """What the layer makes [B, K, depth, D] of the places behind each of K cuts.

    A draft behind place c sees the target's states of the `width` places up to c, and features of its own.
    """
    back = cuts[:, None] + torch.arange(1 - width, 1, device=cuts.device)
    ahead = cuts[:, None] + torch.arange(1, net.config.depth + 1, device=cuts.device)
    rows = torch.cat((final[:, back].to(features.dtype), features[:, ahead]), 2)
    found = net.through(rows.flatten(0, 1))[:, width:]
    return found.view(len(final), len(cuts), *found.shape[1:])


def calibrate(
    net: ChimeraNet, stream: np.ndarray, *, context: int, tokens: int, walk: Walk | None = None
) -> list[list[float]]:
    """How often guess k for a depth is the target's choice, where the tokens drafted before are right."""
    target, depth = net.target, net.config.depth

    def guesses(window: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        # behind the last token nothing is known, and nothing is asked there
        padded = torch.cat((window, window[-1:].expand(depth)))[None]
        states = states_of(target, torch.cat((window, window[-1:]))[None])
        features, found = features_of(net, padded), list[torch.Tensor]()
        full = min(net.config.window, len(window))
        for cuts in (*(range(c, c + 1) for c in range(full - 1)), range(full - 1, len(window))):
            places = torch.tensor(cuts, device=window.device)
            seen = min(full, cuts.start + 1)
            made = drafted_states(net, states.final, features, places, seen)[0]
            last = states.final[0, places]
            logits = [net.logits(net.joined(last, made[:, d], d)) for d in range(depth)]
            found.append(torch.stack(logits, 1).topk(ranks, dim=-1).indices)
        return states.chosen[0], net.tokens(torch.cat(found))

    return count_hits(
        target,
        guesses,
        stream,
        depths=depth,
        kind=net.kind,
        context=context,
        tokens=tokens,
        most=net.config.vocabulary,
        walk=walk,
    )
