"""A head on the hidden states of a draft model that tells how likely each draft is accepted (SpecDec++).

    head = load_drafter(folder, target, AcceptanceHead)
    head(hidden)            # [..., D] of a draft model at drafted tokens -> [...] chances

Huang et al. 2024, arXiv 2405.19715. The state at a drafted token is computed when that token is fed to draft
the next one. The head knows one draft model and one target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from linspec.drafters.trained import TrainedDrafter
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.border import parse
from linspec.utils.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceConfig:
    """width: of the draft model. vocab_size: of both models. blocks: residual blocks of the head.

    draft, draft_fingerprint: the draft model. temperature: at which drafts were sampled and judged.
    """

    width: int
    vocab_size: int
    draft: str
    draft_fingerprint: str
    blocks: int = 3
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size")
        check_sizes(self, "blocks", least=0)


@dataclass(frozen=True, slots=True)
class AcceptanceQuality:
    """What the chances of a head are worth, on held-out text as drafts are judged when they are served.

    slope, shift: of the head's logits, which make chances of them. accepted: share of the drafts. auc: how
    likely an accepted draft has a higher chance than a rejected one. error: mean distance of chances and
    shares. gain: by how much less the head is surprised than one that always says `accepted`.
    """

    slope: float = 1.0
    shift: float = 0.0
    accepted: float = 0.0
    auc: float = 0.5
    error: float = 1.0
    gain: float = 0.0


class AcceptanceHead(TrainedDrafter):
    """Residual blocks x + SiLU(W x + b), and an output of one logit: that of the two classes' difference."""

    kind = "specdec-head"

    def __init__(self, config: AcceptanceConfig) -> None:
        super().__init__()
        self.config, self.quality = config, AcceptanceQuality()
        width = config.width
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.blocks))
        self.out = nn.Linear(width, 1)

    def initialize(self, generator: torch.Generator) -> None:
        """Small weights, no biases: every chance is about a half."""
        with torch.no_grad():
            for part in (*self.blocks, self.out):
                part.weight.normal_(0, 0.02, generator=generator)
                part.bias.zero_()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of acceptance [...], before they are calibrated."""
        # final norms differ from model to model by their weights
        x = F.rms_norm(hidden.to(self.out.weight.dtype), hidden.shape[-1:])
        for block in self.blocks:
            x = x + F.silu(block(x))
        logits: torch.Tensor = self.out(x)[..., 0]
        return logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.quality.slope * self.logits(hidden) + self.quality.shift)

    def described(self) -> dict[str, Any]:
        return {**asdict(self.config), "quality": asdict(self.quality)}

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> Self:
        known = {each.name for each in fields(AcceptanceConfig)}
        given, where = (
            {k: v for k, v in data.items() if k in known},
            f"{path} is not a sound drafter",
        )
        try:
            found = parse(AcceptanceConfig, given, where)
            quality = parse(AcceptanceQuality, data.get("quality", {}), where)
        except ConfigError as error:
            raise DrafterError(str(error)) from error
        if found.vocab_size != target.config.vocab_size:
            raise DrafterError(
                f"the head in {path.parent} judges drafts of {found.vocab_size} tokens, this model has "
                f"{target.config.vocab_size}; train its own: linspec train-drafter --kind specdec-head"
            )
        made = cls(found)
        made.quality = quality
        return made
