"""EAGLE-3-style drafters in training (Li et al. 2025, arXiv 2503.01840): training-time test.

The drafter is unrolled for a few steps over whole windows, each on its own states of the step before. Step j
stands for depth j + 1 of a draft that begins behind every place of the text at once: entry t then holds token
t + 1 + j, and sees the entries of committed places up to t and those of its own draft, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from linspec.drafters.eagle_net import (
    DEEPEST,
    EagleConfig,
    EagleNet,
    layers_to_read,
)
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.fused_block import FusedBlock
from linspec.models.head import cap_of
from linspec.train.drafters.base import RANKS, TRAININGS, DrafterTraining, check_length
from linspec.train.drafters.medusa import NOWHERE, commonest, places_of
from linspec.train.drafters.states import TargetStates, states_of
from linspec.train.drafters.walk import Prediction, Walk
from linspec.train.pieces import Output, Teacher, loss_in_pieces
from linspec.utils.options import option
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_positive, check_sizes


@dataclass(frozen=True, slots=True)
class EagleTrainingOptions:
    """The shape of the drafter, and how it is trained."""

    vocabulary: int = option("draft the commonest tokens only; 0 is all", default=8192)
    steps: int = option("depths that are unrolled in training", default=3)
    depth: int = option("depths that are measured at the end", default=6)
    own_head: bool = option("train an output layer; else use the target's rows", default=True)
    normed: bool = option("normalize states before they are fused and fed back", default=True)
    mlp: int = option("inner width of its MLP; 0 is that of the target", default=0)
    decay: float = option("depth k's loss is weighed by decay^k", default=0.8)

    def __post_init__(self) -> None:
        check_sizes(self, "steps depth")
        check_sizes(self, "vocabulary mlp", least=0)
        check_positive("decay", self.decay)

    def net_for(self, target: DecoderConfig) -> EagleConfig:
        """The shape of the drafter that is trained for a target."""
        return EagleConfig(
            width=target.width,
            vocab_size=target.vocab_size,
            reads=layers_to_read(target.layers),
            vocabulary=min(self.vocabulary, target.vocab_size) or target.vocab_size,
            heads=target.heads,
            kv_heads=target.kv_heads,
            head_width=target.head_width,
            mlp_width=self.mlp or target.mlp_width,
            norm_eps=target.norm_eps or 1e-6,
            rope=target.rope,
            own_head=self.own_head,
            normed=self.normed,
        )


@TRAININGS.register(
    "eagle",
    summary="one layer that goes on from the target's hidden states, unrolled in training",
    paper="Li et al. 2025, arXiv 2503.01840",
    options=EagleTrainingOptions,
)
class EagleTraining(DrafterTraining[EagleNet]):
    """Every unrolled step learns the target's own distribution over the drafted tokens."""

    options: EagleTrainingOptions
    lr = 1e-3

    @property
    def ahead(self) -> int:
        return max(self.options.steps, self.options.depth) + 1

    def reads(self, target: DecoderConfig) -> tuple[int, ...]:
        return layers_to_read(target.layers)

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> EagleNet:
        shape = self.options.net_for(target.config)
        drafted = commonest(stream, shape.vocabulary, shape.vocab_size)
        net = EagleNet(shape, target, drafted=drafted)
        net.initialize(torch.Generator().manual_seed(seed))
        return net

    def loss(self, drafter: EagleNet, states: TargetStates) -> torch.Tensor:
        return eagle_loss(drafter, states, self.options.steps, self.options.decay)

    def measure(
        self, drafter: EagleNet, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction:
        length = min(len(stream), max(tokens, context))
        context = min(context, length)
        check_length(context - 1, self.ahead, self.name)
        walk = Walk(min(self.options.depth, DEEPEST), min(RANKS, drafter.config.vocabulary))
        device = drafter.target.device
        starts = range(0, length - context + 1, context)
        with Progress("measure the drafter", len(starts)) as progress:
            for done, start in enumerate(starts, 1):
                ids = torch.from_numpy(stream[start : start + context].astype(np.int64))
                states = states_of(drafter.target, ids[None].to(device), drafter.config.reads)
                guesses = drafts_of(drafter, states, walk.drafts, walk.ranks)
                walk.add(states.ids[0], states.chosen[0], guesses[0])
                progress.update(done)
        drafter.accuracies = walk.rates()
        return walk.prediction()


class Unroll:
    """A drafter over whole windows, one depth of its drafts after the other.

    states: fused states [B, N, D] of the target at places 0..N-1.
    """

    def __init__(self, net: EagleNet, states: torch.Tensor) -> None:
        self.net, self.states = net, states
        self._block = cast(FusedBlock, net.decoder.layers[0])
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the output layer reads [B, n, D] of the next depth, for the first n places.

        tokens [B, n]: of entry t, the one behind place t in the first step, then the one drafted last.
        """
        decoder, block = self.net.decoder, self._block
        count, depth = tokens.shape[1], len(self._keys)
        states = self.states[:, :count]
        both = torch.cat((decoder.embed(tokens).to(states.dtype), states), dim=-1)
        read, own = block.fused(both)
        places = torch.arange(depth, depth + count, device=tokens.device)
        rope = decoder.rotary(places, read.dtype)
        q, k, v = block.mixer.to_features(*block.mixer.split_heads(read), rope)
        self._keys.append(k)
        self._values.append(v)
        raw = block.closed(own, block.mixer.o(self._attended(q)))
        final = decoder.leave(raw)
        self.states = self.net.fed_back(final, raw)
        return final

    def _attended(self, q: torch.Tensor) -> torch.Tensor:
        """Values [B, n, H V] that queries q [B, n, H, K] read: committed entries, then each its own draft."""
        count = q.shape[1]
        mixer, config = self._block.mixer, self.net.decoder.config
        q = q.unflatten(2, (mixer.kv_heads, -1)) * config.score_scale
        past = torch.einsum("bnhrk,bmhk->bhrnm", q, self._keys[0][:, :count])
        later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
        own = [
            torch.einsum("bnhrk,bnhk->bhrn", q, keys[:, :count])[..., None]
            for keys in self._keys[1:]
        ]
        weights = torch.cat((past.masked_fill(later, float("-inf")), *own), -1).softmax(-1)
        weights = weights.to(self._values[0].dtype)
        out = torch.einsum("bhrnm,bmhv->bnhrv", weights[..., :count], self._values[0][:, :count])
        for number, values in enumerate(self._values[1:]):
            mine = weights[..., count + number].permute(0, 3, 1, 2)[..., None]
            out = out + mine * values[:, :count, :, None]
        return out.flatten(2)


def fused_states(net: EagleNet, states: TargetStates) -> torch.Tensor:
    """What the drafter makes of the target's states at every place but the last [B, T - 1, D]."""
    read = torch.cat([states.layers[layer] for layer in net.config.reads], -1)
    return net.fused(read[:, :-1])


def target_output(net: EagleNet) -> Output:
    """The target's output layer for the drafted tokens."""
    return Output(net.target_rows(), cap=cap_of(net.target.head))


def eagle_loss(net: EagleNet, states: TargetStates, steps: int, decay: float) -> torch.Tensor:
    """Σ_j decay^j · CE of unrolled step j against the target's distribution over the drafted tokens.

    At step j entry t holds token t + 1 + j, and learns what the target says behind that one. Entries whose
    likeliest token cannot be drafted teach nothing.
    """
    unroll = Unroll(net, fused_states(net, states))
    output = Output.of(net.decoder.head)
    theirs = target_output(net)
    known = places_of(states.chosen, net.drafted, net.config.vocab_size) != NOWHERE
    loss = states.final.new_zeros((), dtype=torch.float32)
    for j in range(steps):
        count = states.final.shape[1] - 1 - j
        place = slice(1 + j, 1 + j + count)
        counted = known[:, place]
        weights = decay**j * counted / counted.sum().clamp(min=1)
        teacher = Teacher(states.final[:, place], theirs, weights, soft=True)
        loss = loss + loss_in_pieces(unroll.step(states.ids[:, place]), output, teacher=teacher)
    return loss


@torch.inference_mode()
def drafts_of(net: EagleNet, states: TargetStates, depth: int, ranks: int) -> torch.Tensor:
    """The likeliest tokens [B, T - 1, depth, ranks] of drafts behind every place, as they are served:
    on their own tokens and states.

    NOWHERE where a depth lies behind the window.
    """
    unroll, drafted = Unroll(net, fused_states(net, states)), net.drafted.long()
    tokens = states.ids[:, 1 : states.final.shape[1]]
    found = tokens.new_full((*tokens.shape, depth, ranks), NOWHERE)
    for d in range(min(depth, tokens.shape[1])):
        final = unroll.step(tokens[:, : found.shape[1] - d])
        best = drafted[net.decoder.head(final).topk(ranks).indices]
        found[:, : best.shape[1], d] = best
        tokens = best[..., 0]
    return found
