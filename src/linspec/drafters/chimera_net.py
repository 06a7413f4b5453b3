"""The small network of Chimera (Zeng et al. 2024, arXiv 2402.15758): what it computes.

Places of the text that are verified enter as the target's final states, later ones as features of three
tokens. One layer lets them see the places before them; a projection joins what comes out with the state of
the last verified place, and the target's output layer makes scores of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from linspec.drafters.trained import TrainedDrafter, check_drafted, read_accuracies, read_shape
from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.utils.sizes import check_sizes

# tokens whose embeddings make the features of a place
TOKENS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChimeraConfig:
    """The shape of the network.

    width, vocab_size: of the target. depth: tokens of the deepest draft. heads, head_width, inner: of its
    layer. window: how many places back it sees. vocabulary: how many tokens can be drafted, 0 for all.
    """

    width: int
    vocab_size: int
    depth: int = 4
    heads: int = 4
    head_width: int = 32
    inner: int = 512
    window: int = 32
    vocabulary: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size depth heads head_width inner window")
        check_sizes(self, "vocabulary", least=0)
        if self.vocabulary > self.vocab_size:
            raise ConfigError(
                f"a drafter cannot draft {self.vocabulary} tokens of the {self.vocab_size} that its target "
                "has; 0 is all"
            )

    @property
    def layer(self) -> DecoderConfig:
        """Its layer, as a decoder that is given embeddings: of tokens it knows a single one."""
        return DecoderConfig(
            vocab_size=1,
            width=self.width,
            layers=1,
            heads=self.heads,
            kv_heads=self.heads,
            head_width=self.head_width,
            mlp_width=self.inner,
            tied_embeddings=False,
            mixers=(MixerConfig(name="window", window=self.window),),
        )


class ChimeraNet(TrainedDrafter):
    """Features of three tokens, one layer, and a projection for each depth.

    drafted: the ids of the tokens that are chosen among, None for all. accuracies[d][k]: how often guess k
    for depth d + 1 was right where the tokens before it were.
    """

    kind = "chimera"
    drafted: torch.Tensor | None

    def __init__(
        self,
        config: ChimeraConfig,
        target: Decoder,
        accuracies: Sequence[Sequence[float]] = (),
        drafted: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.accuracies = [list(row) for row in accuracies]
        if config.vocabulary and drafted is None:
            drafted = torch.arange(config.vocabulary, dtype=torch.int32)
        self.register_buffer("drafted", drafted if config.vocabulary else None)
        self.enter = nn.Linear(TOKENS * width, width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.layer = Decoder(config.layer)
        self.join = nn.Parameter(torch.zeros(config.depth, width, 2 * width))
        # in a tuple, so that it is not registered as a part
        self._target = (target,)

    @property
    def target(self) -> Decoder:
        """The model that it drafts for."""
        return self._target[0]

    def initialize(self, generator: torch.Generator) -> None:
        """Small weights, and projections that begin with the mean of both states."""
        width = self.config.width
        with torch.no_grad():
            for weight in self.parameters():
                if weight.dim() == 2:
                    weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
            self.join.zero_()
            self.join[:, :, :width] = self.join[:, :, width:] = 0.5 * torch.eye(width)

    def described(self) -> dict[str, Any]:
        return {**asdict(self.config), "accuracies": self.accuracies}

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> Self:
        config = read_shape(ChimeraConfig, data, target, path)
        given = data.get("accuracies", [])
        accuracies = read_accuracies(given, config.depth, config.vocab_size, path)
        return cls(config, target, accuracies)

    def check_weights(self, path: Path) -> None:
        check_drafted(self.drafted, self.config.vocab_size, path)

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """Features [..., D] of the last of three token ids [..., 3], as the layer sees them."""
        x = self.target.embed(ids).to(self.mix.weight.dtype)
        # of whatever scale embeddings are
        x = F.rms_norm(x, x.shape[-1:]).flatten(-2)
        return self.mix(F.silu(self.enter(x)))

    def through(self, x: torch.Tensor) -> torch.Tensor:
        """The layer over whole texts [B, T, D] of states and features, in its full form."""
        positions = torch.arange(x.shape[1], device=x.device)
        _, ropes = self.layer.enter(torch.zeros_like(positions)[None], positions)
        return self.layer.leave(self.layer.layers[0](x, ropes[0]))

    def joined(self, last: torch.Tensor, found: torch.Tensor, depth: int) -> torch.Tensor:
        """What the output layer takes [..., D] for a depth, counted from 0.

        last: the state of the last verified place; found: what the layer made of the token before.
        """
        return F.linear(torch.cat((last.expand_as(found), found), -1), self.join[depth])

    def logits(self, joined: torch.Tensor) -> torch.Tensor:
        """Scores of the drafted tokens, in training."""
        if self.drafted is None:
            return self.target.head(joined)
        return F.linear(joined, self.target.head.weight[self.drafted.long()])

    def tokens(self, indices: torch.Tensor) -> torch.Tensor:
        """The token ids that indices of logits stand for."""
        return indices if self.drafted is None else self.drafted.long()[indices]
