"""Acceptance heads in training (SpecDec++, Huang et al. 2024, arXiv 2405.19715): both models stay.

At every place of a text the draft model draws a token, and the target's distribution behind the same text
says how likely it is accepted. The head reads the draft model's states over a text in which most tokens are
such draws, as its context is when it drafts. Rejections are rare and weigh more; the calibration at the end
takes that back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F

from linspec.checkpoints.fingerprint import fingerprint
from linspec.checkpoints.hub import load_model
from linspec.checkpoints.resolve import resolve
from linspec.decoding.step import StepInput
from linspec.drafters.acceptance_head import (
    AcceptanceConfig,
    AcceptanceHead,
    AcceptanceQuality,
)
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS, DrafterTraining, check_length
from linspec.train.drafters.calibration import area_under_curve, calibration_error
from linspec.train.drafters.states import TargetStates, states_of
from linspec.train.drafters.walk import Prediction, Walk
from linspec.utils.options import option
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_positive, check_sizes

# drafts of the chain that is predicted
_DRAFTS = 4
# tokens of a text that are read together, each with its draft beside it
_TOGETHER = 32
# drafts' worth of the assumption that the calibration is the one that the weight of rejections needs
_PRIOR = 4.0


@dataclass(frozen=True, slots=True)
class SpecDecHeadTrainingOptions:
    """The draft model, the shape of the head, and how it is trained."""

    draft: str | None = option(
        "directory or name of the draft model; it has to be given", default=None, short=True
    )
    blocks: int = option("residual blocks of the head", default=3)
    temperature: float = option("of requests; 0 learns which drafts are the likeliest", default=0.0)
    mix: float = option("share of the text's own tokens among what the head reads", default=0.15)
    weight: float = option("how much more a rejection counts than an acceptance", default=6.0)

    def __post_init__(self) -> None:
        check_sizes(self, "blocks", least=0)
        check_positive("temperature", self.temperature, zero=True)
        check_positive("weight", self.weight)
        if not 0 <= self.mix < 1:
            raise ConfigError(f"mix must be at least 0 and below 1, got {self.mix}; 0.15 is usual")


@TRAININGS.register(
    "specdec-head",
    summary="a head that tells which drafts of a smaller model are accepted",
    paper="Huang et al. 2024, arXiv 2405.19715",
    options=SpecDecHeadTrainingOptions,
)
class SpecDecHeadTraining(DrafterTraining[AcceptanceHead]):
    """The head learns the chance that a draft of a frozen draft model is accepted by the frozen target."""

    options: SpecDecHeadTrainingOptions
    lr = 1e-3

    def __init__(self, options: SpecDecHeadTrainingOptions) -> None:
        super().__init__(options)
        if options.draft is None:
            raise ConfigError(
                "an acceptance head judges the drafts of a smaller model; name it: "
                "--kind specdec-head:draft=DIR"
            )
        self.folder = resolve(options.draft)
        # the target and its draft model, once `make` has read that
        self._models: tuple[Decoder, Decoder] | None = None

    @property
    def draft(self) -> Decoder:
        """The draft model."""
        assert self._models is not None, "make comes first"
        return self._models[1]

    def make(self, target: Decoder, stream: np.ndarray, seed: int) -> AcceptanceHead:
        draft = load_model(str(self.folder), device=str(target.device)).requires_grad_(False)
        if draft.config.vocab_size != target.config.vocab_size:
            raise ConfigError(
                f"the draft model has {draft.config.vocab_size} tokens, the target "
                f"{target.config.vocab_size}: both must share one tokenizer"
            )
        self._models = target, draft
        config = AcceptanceConfig(
            width=draft.config.width,
            vocab_size=draft.config.vocab_size,
            draft=str(self.options.draft),
            draft_fingerprint=fingerprint(draft),
            blocks=self.options.blocks,
            temperature=self.options.temperature,
        )
        head = AcceptanceHead(config)
        head.initialize(torch.Generator().manual_seed(seed))
        return head

    def loss(self, drafter: AcceptanceHead, states: TargetStates) -> torch.Tensor:
        # the same draws for the same windows: a run that is resumed is the same run
        generator = _generator(states.ids)
        with torch.no_grad():
            draws = drawn(self.draft, states, self.options.temperature, generator)
            own = torch.rand(draws.tokens.shape, generator=generator).to(draws.tokens.device)
            kept = own < self.options.mix
            mixed = torch.where(kept, states.ids[:, 1:], draws.tokens)
            read = self.draft.hidden(torch.cat((states.ids[:, :1], mixed), 1))[:, 1:]
        logits = drafter.logits(read).float()
        return weighted_loss(logits[~kept], draws.accepted[~kept], self.options.weight)

    @torch.inference_mode()
    def measure(
        self, drafter: AcceptanceHead, stream: np.ndarray, *, context: int, tokens: int
    ) -> Prediction | None:
        length = min(len(stream), max(tokens, context))
        context = min(context, length)
        check_length(context - 1, _DRAFTS, self.name)
        walk, trials = Walk(_DRAFTS, 1), list[tuple[torch.Tensor, torch.Tensor]]()
        starts = range(0, length - context + 1, context)
        with Progress("measure the head", len(starts)) as progress:
            for done, start in enumerate(starts, 1):
                ids = torch.from_numpy(stream[start : start + context].astype(np.int64))
                trials.append(self._window(drafter, ids, walk))
                progress.update(done)
        logits, accepted = (torch.cat(part) for part in zip(*trials, strict=True))
        # what the weight of rejections has taken from the logits
        drafter.quality = quality_of(logits, accepted, math.log(self.options.weight))
        return walk.prediction() if self.options.temperature == 0 else None

    def _window(
        self, drafter: AcceptanceHead, ids: torch.Tensor, walk: Walk
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and acceptance of drafts behind every place of a window; enters its rounds in `walk`."""
        assert self._models is not None, "make comes first"
        target, draft = self._models
        states = states_of(target, ids[None].to(target.device))
        draws = drawn(draft, states, self.options.temperature, _generator(ids))
        tokens = draws.tokens[0].cpu()
        logits = drafter.logits(served_states(draft, states.ids[0, :-1], draws.tokens[0]))
        places = torch.arange(1, 1 + len(tokens) - _DRAFTS)[:, None] + torch.arange(_DRAFTS)
        walk.add(ids, states.chosen[0].cpu(), tokens[places][..., None])
        return logits.float().cpu(), draws.accepted[0].cpu()


@dataclass(frozen=True, slots=True)
class Draws:
    """What a draft model draws behind every place of windows [B, T], and how likely each is accepted."""

    tokens: torch.Tensor
    accepted: torch.Tensor


def drawn(
    draft: Decoder, states: TargetStates, temperature: float, generator: torch.Generator
) -> Draws:
    """One token behind every place but the last: the likeliest at temperature 0, else a sample."""
    logits = draft.head(draft.hidden(states.ids[:, :-1])).float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return Draws(tokens, (tokens == states.chosen).float())
    ours = (logits / temperature).softmax(-1)
    theirs = (states.target.head(states.final).float() / temperature).softmax(-1)
    luck = torch.rand((*ours.shape[:-1], 1), generator=generator).to(ours.device)
    sums = ours.cumsum(-1)
    tokens = torch.searchsorted(sums, luck * sums[..., -1:]).clamp(max=ours.shape[-1] - 1)
    ratio = theirs.gather(-1, tokens) / ours.gather(-1, tokens).clamp(min=1e-30)
    return Draws(tokens[..., 0], ratio[..., 0].clamp(max=1.0))


def _generator(ids: torch.Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(ids.cpu().numpy().tobytes()))


def weighted_loss(logits: torch.Tensor, accepted: torch.Tensor, weight: float) -> torch.Tensor:
    """-Σ[p log f + w (1 - p) log(1 - f)], over Σp + w Σ(1 - p)."""
    right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
    missed = weight * (1 - accepted)
    return -(accepted * right + missed * wrong).sum() / (accepted + missed).sum().clamp(min=1e-9)


def served_states(draft: Decoder, ids: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """States [T, D] at drafts [T], where draft t stands behind the first t + 1 tokens of a text, alone.

    So it stands when it is served: what comes before it was accepted.
    """
    state, found = draft.new_state(1), []
    for start in range(0, len(ids), _TOGETHER):
        known = ids[start : start + _TOGETHER].tolist()
        beside = drafts[start : start + _TOGETHER].tolist()
        parents = [*range(-1, len(known) - 1), *range(len(known))]
        hidden = draft.step([StepInput(0, [*known, *beside], parents)], state).hidden
        found.append(hidden[len(known) :])
        state.commit(0, range(len(known)))
    return torch.cat(found)


def quality_of(logits: torch.Tensor, accepted: torch.Tensor, shift: float) -> AcceptanceQuality:
    """The calibration of a head by how its drafts were judged, and what its chances are worth then.

    shift: what the logits [N] lack by themselves, such as what a weight has taken from them.
    """
    logits, accepted = logits.double(), accepted.double()
    slope, shift = fitted(logits, accepted, shift)
    found = slope * logits + shift
    chances, share = found.sigmoid(), accepted.mean()
    usual = torch.full_like(found, float(torch.logit(share.clamp(1e-6, 1 - 1e-6))))
    surprise, known, least = (
        F.binary_cross_entropy_with_logits(each, accepted)
        for each in (found, usual, torch.logit(accepted.clamp(1e-9, 1 - 1e-9)))
    )
    gain = 1 - float((surprise - least) / (known - least).clamp(min=1e-9))
    return AcceptanceQuality(
        slope=round(slope, 5),
        shift=round(shift, 5),
        accepted=round(float(share), 5),
        auc=round(area_under_curve(chances, accepted > 0.5), 5),
        error=round(calibration_error(chances, accepted), 5),
        gain=round(gain, 5),
    )


def fitted(logits: torch.Tensor, accepted: torch.Tensor, shift: float) -> tuple[float, float]:
    """Slope and shift of logits [N] that explain accepted [N] best (Platt 1999), by Newton's method."""
    given = torch.stack((logits, torch.ones_like(logits)), 1)
    start = torch.tensor([1.0, shift], dtype=logits.dtype)
    found = start.clone()
    for _ in range(25):
        chances = (given @ found).sigmoid()
        slope = given.T @ (chances - accepted) + _PRIOR * (found - start)
        bend = (given * (chances * (1 - chances))[:, None]).T @ given
        step = torch.linalg.solve(bend + _PRIOR * torch.eye(2, dtype=logits.dtype), slope)
        found = found - step.clamp(-2.0, 2.0)
    return float(found[0]), float(found[1])
