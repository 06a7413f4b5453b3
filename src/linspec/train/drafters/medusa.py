"""Medusa heads in training (Cai et al. 2024, arXiv 2401.10774)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from linspec.drafters.heads import Heads, HeadsConfig, MedusaHeads
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import RANKS, TRAININGS, DrafterTraining, check_length
from linspec.train.drafters.states import TargetStates
from linspec.train.drafters.walk import Prediction, Walk
from linspec.train.pieces import IGNORED, Labels, Output, likeliest, loss_in_pieces
from linspec.utils.options import option
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_positive, check_sizes

# no place of a token: what a cross-entropy leaves out
NOWHERE = IGNORED


@dataclass(frozen=True, slots=True)
class MedusaTrainingOptions:
    """The shape of the heads, and how their losses are weighed."""

    heads: int = option("heads, each for one more token ahead", default=3)
    blocks: int = option("residual blocks of each head", default=1)
    hidden: int = option("inner width of a block; 0 is the paper's block without one", default=512)
    shared_head: bool = option("use the target's output layer, not copies of it", default=True)
    rooted: bool = option("heads see the token that the draft begins behind", default=True)
    vocabulary: int = option(
        "draft the commonest tokens only, cheaper where the vocabulary is large; 0 is all",
        default=0,
    )
    decay: float = option("head k's loss is weighed by decay^k", default=0.8)

    def __post_init__(self) -> None:
        check_sizes(self, "heads blocks")
        check_sizes(self, "hidden vocabulary", least=0)
        check_positive("decay", self.decay)

    def heads_for(self, target: DecoderConfig) -> HeadsConfig:
        """The shape of the heads that are trained for a target."""
        return HeadsConfig(
            width=target.width,
            vocab_size=target.vocab_size,
            heads=self.heads,
            blocks=self.blocks,
            hidden=self.hidden,
            shared_head=self.shared_head,
            rooted=self.rooted,
            vocabulary=min(self.vocabulary, target.vocab_size),
        )


@TRAININGS.register(
    "medusa",
    summary="heads on the last hidden state, calibrated for a tree",
    paper="Cai et al. 2024, arXiv 2401.10774; Ankner et al. 2024, arXiv 2402.05109",
    options=MedusaTrainingOptions,
)
class MedusaTraining(DrafterTraining[MedusaHeads]):
    """Every head learns the target's own choice, so many places further on."""

    options: MedusaTrainingOptions

    @property
    def ahead(self) -> int:
        return self.options.heads

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> MedusaHeads:
        shape = self.options.heads_for(target.config)
        drafted = commonest(stream, shape.vocabulary, shape.vocab_size)
        heads = MedusaHeads(shape, target, drafted=drafted)
        heads.initialize(torch.Generator().manual_seed(seed))
        return heads

    def loss(self, drafter: MedusaHeads, states: TargetStates) -> torch.Tensor:
        return heads_loss(drafter, states, decay=self.options.decay)

    def measure(
        self, drafter: MedusaHeads, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction:
        target, walk = drafter.target, Walk(drafter.config.heads, 1)
        assert isinstance(target, Decoder)
        sizes = {"context": context, "tokens": tokens}
        drafter.accuracies = calibrate(target, drafter, stream, walk=walk, **sizes)
        return walk.prediction()


def commonest(stream: np.ndarray, count: int, vocabulary: int) -> torch.Tensor | None:
    """The ids of the `count` tokens of `stream` that come up most often, ascending; None for 0, all."""
    if not count:
        return None
    counts = np.bincount(stream, minlength=vocabulary)
    ids = np.sort(np.argsort(-counts, kind="stable")[:count])
    return torch.from_numpy(ids.astype(np.int32))


def places_of(ids: torch.Tensor, drafted: torch.Tensor | None, vocabulary: int) -> torch.Tensor:
    """Where token ids stand among those that are drafted, NOWHERE for the others."""
    if drafted is None:
        return ids
    places = torch.full((vocabulary,), NOWHERE, device=ids.device)
    places[drafted.long()] = torch.arange(len(drafted), device=ids.device)
    return places[ids]


def heads_loss(heads: MedusaHeads, states: TargetStates, decay: float) -> torch.Tensor:
    """Σ_k decay^k · CE of head k on the target's own choice k + 1 places on.

    The target's choice (its argmax after the text so far) is what a draft is verified against; the
    text's own token is often one that no drafter could guess. Choices that are not among the drafted tokens
    teach nothing.
    """
    hidden = states.final
    chosen = places_of(states.chosen, heads.drafted, heads.config.vocab_size)
    features = heads.features(heads.seen(hidden, states.ids[:, 1:]))
    loss = hidden.new_zeros((), dtype=torch.float32)
    for k in range(1, heads.config.heads + 1):
        output, labels = _output(heads, k - 1), Labels(chosen[:, k:])
        loss = loss + decay**k * loss_in_pieces(features[:, :-k, k - 1], output, labels)
    return loss


def _output(heads: MedusaHeads, head: int) -> Output:
    """What `MedusaHeads.logits` of one head (0-based) is computed by."""
    if not heads.config.shared_head:
        return Output(heads.out[head])
    if heads.drafted is not None:
        return Output(heads.target_rows())
    return Output.of(heads.target_head)


@torch.inference_mode()
def calibrate(
    target: Decoder,
    heads: Heads,
    stream: np.ndarray,
    *,
    context: int,
    tokens: int,
    walk: Walk | None = None,
) -> list[list[float]]:
    """a_k(i): the share of positions of `stream` where head k's rank-i guess is the target's choice.

    Measured on consecutive windows of `context` tokens, `tokens` in all; RANKS columns, or fewer
    for a tiny vocabulary. walk: counts the rounds in the same windows.
    """
    length = min(len(stream), max(tokens, context))
    context = min(context, length)
    check_length(context - 1, heads.config.heads, MedusaHeads.kind)
    ranks = min(RANKS, heads.config.vocabulary or heads.config.vocab_size)
    device = target.embed.weight.device
    hits = torch.zeros(heads.config.heads, ranks, dtype=torch.long)
    seen = torch.zeros(heads.config.heads, 1, dtype=torch.long)
    starts = range(0, length - context + 1, context)
    with Progress("calibrate heads", len(starts)) as progress:
        for done, start in enumerate(starts, 1):
            ids = torch.from_numpy(np.asarray(stream[start : start + context], dtype=np.int64))
            hidden = target.hidden(ids[None].to(device))
            chosen = likeliest(hidden, target.head, target.config.vocab_size)
            # behind the last token nothing is known, and no head is asked there
            features = heads.features(heads.seen(hidden, ids[None].roll(-1, 1)))
            firsts = []
            for k in range(1, heads.config.heads + 1):
                guesses = heads.logits(features[:, :-1, k - 1], k - 1).topk(ranks).indices
                guesses = heads.tokens(guesses)
                firsts.append(guesses[0, :, :1])
                right = guesses[:, : chosen.shape[1] - k] == chosen[:, k:, None]
                hits[k - 1] += right.sum((0, 1)).cpu()
                seen[k - 1] += right.shape[1]
            if walk is not None:
                walk.add(ids.to(device), chosen[0], torch.stack(firsts, 1))
            progress.update(done)
    return [[round(rate, 5) for rate in row] for row in (hits / seen).tolist()]
