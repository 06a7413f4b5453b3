"""Block drafters in training, after DFlash and DSpark (arXiv 2602.06036, 2607.05147).

Blocks begin at many places of every window and go through the drafter together: each sees the context
before its anchor and itself alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from linspec.drafters.block_net import BlockConfig, BlockNet, Measured, visible
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS, DrafterTraining, check_length
from linspec.train.drafters.calibration import (
    area_under_curve,
    calibration_error,
    conditional,
    reached_of,
    temperatures,
)
from linspec.train.drafters.medusa import NOWHERE, commonest, places_of
from linspec.train.drafters.states import TargetStates, states_of
from linspec.train.drafters.walk import Prediction, agreement, round_starts
from linspec.utils.options import option
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_positive, check_sizes

# weights of the losses: of tokens, of distributions, of confidences
TOKEN, DISTANCE, SURE = 0.1, 0.9, 1.0


@dataclass(frozen=True, slots=True)
class BlockTrainingOptions:
    """The shape of a block drafter, and how it learns."""

    places: int = option("tokens of a block, all drafted at once", default=4)
    depth: int = option("layers of the drafter", default=2)
    mlp: int = option("inner width of their MLPs; 0 is half of the target's", default=0)
    window: int = option("newest tokens that a block sees", default=128)
    vocabulary: int = option("draft the commonest tokens only; 0 is all", default=8192)
    rank: int = option("of the head that sees the token before", default=64)
    every: int = option("a block begins at every so many tokens of a text", default=4)
    decay: float = option("the loss of place k is weighed by decay^k", default=0.8)

    def __post_init__(self) -> None:
        check_sizes(self, "places depth window rank every")
        check_sizes(self, "mlp vocabulary", least=0)
        check_positive("decay", self.decay)

    def shape_for(self, target: DecoderConfig) -> BlockConfig:
        """The shape of the drafter that is trained for a target."""
        return BlockConfig(
            width=target.width,
            vocab_size=target.vocab_size,
            read=layers_read(target.layers),
            heads=target.heads,
            kv_heads=target.kv_heads,
            head_width=target.head_width,
            mlp_width=self.mlp or max(1, target.mlp_width // 2),
            depth=self.depth,
            places=self.places,
            window=self.window,
            vocabulary=min(self.vocabulary, target.vocab_size) if self.vocabulary else 0,
            rank=self.rank,
            eps=target.norm_eps,
        )


def layers_read(layers: int) -> tuple[int, ...]:
    """An early, a middle and a late layer of a model, as far as it has so many."""
    return tuple(sorted({min(1, layers - 1), (layers - 1) // 2, max(0, layers - 4)}))


@TRAININGS.register(
    "block",
    summary="a small decoder drafts a block in one pass, and says how sure it is of each token",
    paper="Chen et al. 2026, arXiv 2602.06036; DeepSeek-AI 2026, arXiv 2607.05147",
    options=BlockTrainingOptions,
)
class BlockTraining(DrafterTraining[BlockNet]):
    """Places learn the target's choices and distributions; the confidence how well they match."""

    options: BlockTrainingOptions
    lr = 1e-3

    @property
    def ahead(self) -> int:
        return self.options.places

    def reads(self, target: DecoderConfig) -> tuple[int, ...]:
        return layers_read(target.layers)

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> BlockNet:
        shape = self.options.shape_for(target.config)
        drafted = commonest(stream, shape.vocabulary, shape.vocab_size)
        drafter = BlockNet(shape, target, drafted=drafted)
        length = min(_SAMPLE, target.config.position_limit or _SAMPLE)
        sample = torch.from_numpy(np.asarray(stream[:length], dtype=np.int64))[None]
        found = states_of(target, sample.to(target.device), shape.read)
        states = [found.layers[layer].cpu() for layer in shape.read]
        drafter.initialize(torch.Generator().manual_seed(seed), states)
        return drafter

    def loss(self, drafter: BlockNet, states: TargetStates) -> torch.Tensor:
        return block_loss(drafter, states, every=self.options.every, decay=self.options.decay)

    def measure(
        self, drafter: BlockNet, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction:
        target = drafter.target
        assert isinstance(target, Decoder)
        drafter.measured = calibrate(target, drafter, stream, context=context, tokens=tokens)
        return Prediction.of(drafter.measured.acceptance, drafter.config.places)


# tokens from which the scale of the target's states is taken
_SAMPLE = 512


def anchors_of(states: TargetStates, places: int, every: int) -> torch.Tensor:
    """Where blocks begin, [A]: every so many tokens from a place that depends on the text.

    There is a token of context before each, and a state of the target at each of its places.
    """
    room = states.ids.shape[1] - 1 - places
    every = min(every, room)
    first = 1 + states.ids.sum() % every
    steps = torch.arange(max(1, room // every), device=states.ids.device)
    return (first + every * steps).clamp(max=room)


def block_states(
    drafter: BlockNet, states: TargetStates, anchors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized states [R, A, B, D] of blocks at `anchors` [A], and the embedded roots [R, A, D]."""
    ids = states.ids
    context = drafter.context([states.layers[layer] for layer in drafter.config.read])
    rows, count = context.shape[:2]
    positions = torch.arange(count, device=ids.device).expand(rows, -1)
    kept = drafter.rows(context, positions)
    seen = visible(anchors, count, drafter.config.window).expand(rows, -1, -1)
    roots = drafter.embedded(ids[:, anchors])
    given = context[:, anchors - 1], roots, anchors.expand(rows, -1)
    return drafter.blocks(*given, kept, seen), roots


def block_logits(
    drafter: BlockNet, states: torch.Tensor, before: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Logits [..., B, V] of places whose tokens before, [..., B, rank], are known."""
    return F.linear(states, rows.to(states.dtype)) + drafter.markov_out(before)


def block_loss(
    drafter: BlockNet, states: TargetStates, *, every: int, decay: float
) -> torch.Tensor:
    """0.1 · CE + 0.9 · |p_d - p_t|_1 + 1.0 · BCE of the confidence, place k weighed by decay^k.

    p_t is the target's distribution among the drafted tokens; places whose choice is not among these teach
    the confidence alone. Its label is whether the likeliest token is the target's choice: so drafts are
    judged here, while the paper's 1 - |p_d - p_t|_1 / 2 is how often a draft is kept that was sampled.
    """
    anchors = anchors_of(states, drafter.config.places, every)
    found, _ = block_states(drafter, states, anchors)
    # [A, B]: where the target's own states for the drafts of a block are
    places = anchors[:, None] + torch.arange(drafter.config.places, device=anchors.device)
    before = drafter.markov_in(drafter.embedded(states.ids[:, places]))
    rows = drafter.target_rows().detach()
    logits = block_logits(drafter, found, before, rows).float()
    with torch.no_grad():
        own = F.linear(states.final[:, places], rows.to(states.final.dtype)).float().softmax(-1)
        labels = places_of(states.chosen, drafter.drafted, drafter.config.vocab_size)[:, places]
        known = labels != NOWHERE
    log_shares = logits.log_softmax(-1)
    token = -log_shares.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    distance = (log_shares.exp() - own).abs().sum(-1)
    wanted = (logits.argmax(-1) == labels).float()
    sure = drafter.sureness(found.detach(), before.detach()).float()
    doubt = F.binary_cross_entropy_with_logits(sure, wanted, reduction="none")
    each = torch.where(known, TOKEN * token + DISTANCE * distance, 0.0) + SURE * doubt
    weights = decay ** torch.arange(drafter.config.places, device=each.device)
    return (each * weights).mean((0, 1)).sum() / weights.sum()


@dataclass(slots=True)
class Trials:
    """Blocks of rounds, as an engine would have them, and what the target chose.

    right [N, B] bool: the draft was the target's choice. follows [N, B]: so was the text's next token; only
    then is the target's choice for the next place known. sure [N, B]: logits of the confidences.
    """

    right: list[torch.Tensor] = field(default_factory=list)
    follows: list[torch.Tensor] = field(default_factory=list)
    sure: list[torch.Tensor] = field(default_factory=list)

    def add(
        self,
        agreed: torch.Tensor,
        right: torch.Tensor,
        follows: torch.Tensor,
        sure: torch.Tensor,
    ) -> None:
        """Enter the rounds among the blocks of one window, whose row i begins at place i + 1."""
        judged = torch.ones_like(follows)
        judged[:, 1:] = follows[:, :-1].cumprod(1)
        rounds = round_starts((judged & right.cumprod(1).bool()).sum(1), agreed)
        for kept, given in ((self.right, right), (self.follows, follows), (self.sure, sure)):
            kept.append(given[rounds].cpu())

    def judged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, B] each: which places can be judged, which were right together with all before, logits."""
        known = torch.ones_like(torch.cat(self.follows))
        known[:, 1:] = torch.cat(self.follows)[:, :-1].cumprod(-1).bool()
        return known, torch.cat(self.right).cumprod(-1).bool(), torch.cat(self.sure)


@torch.inference_mode()
def draft_all(drafter: BlockNet, states: TargetStates, trials: Trials) -> None:
    """Draft from every place of some windows, and enter what the target chose in the rounds of each."""
    room = states.ids.shape[1] - 1 - drafter.config.places
    places = torch.arange(drafter.config.places, device=states.ids.device)
    parts = []
    for start in range(1, room + 1, _TOGETHER):
        anchors = torch.arange(start, min(start + _TOGETHER, room + 1), device=states.ids.device)
        found, roots = block_states(drafter, states, anchors)
        drafts, sure = drafter.walk(found, drafter.unary(found), roots)
        at = anchors[:, None] + places
        right = drafter.tokens(drafts) == states.chosen[:, at]
        follows = states.chosen[:, at] == states.ids[:, at + 1]
        parts.append((right, follows, sure.float()))
    whole = [torch.cat(part, 1) for part in zip(*parts, strict=True)]
    for ids, chosen, *given in zip(states.ids, states.chosen, *whole, strict=True):
        trials.add(agreement(ids, chosen), *given)


# anchors that are drafted from at once
_TOGETHER = 128


def calibrate(
    target: Decoder, drafter: BlockNet, stream: np.ndarray, *, context: int, tokens: int
) -> Measured:
    """How often each place is right as it is served, and temperatures that make its confidences shares.

    In the rounds of consecutive windows of `context` tokens, `tokens` in all. A place can be judged where the
    text before it is what the target chose.
    """
    length = min(len(stream), max(tokens, context))
    context = min(context, length)
    check_length(context - 1, drafter.config.places, BlockNet.kind)
    starts = range(0, length - context + 1, context)
    trials = Trials()
    with Progress("measure the drafter", len(starts)) as progress, torch.inference_mode():
        for done, start in enumerate(starts, 1):
            ids = torch.from_numpy(np.asarray(stream[start : start + context], dtype=np.int64))
            states = states_of(target, ids[None].to(target.device), drafter.config.read)
            draft_all(drafter, states, trials)
            progress.update(done)
    return measured(trials)


def measured(trials: Trials) -> Measured:
    """Acceptance by place once those before it are right, temperatures, and how good confidences are then."""
    known, survived, sure = trials.judged()
    reached = reached_of(known, survived)
    scales = temperatures(known, survived, sure)
    product = (sure / torch.tensor(scales)).sigmoid().cumprod(-1)
    parts = list(zip(known.T, reached.T, survived.T, sure.T, product.T, strict=True))
    auc = [area_under_curve(c[at], right[at]) for _, at, right, c, _ in parts]
    ece = [calibration_error(p[at], right[at]) for at, _, right, _, p in parts]
    shares = conditional(reached, survived)
    return Measured(*([round(x, 5) for x in numbers] for numbers in (shares, scales, auc, ece)))
