"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): what they compute.

Head k (1-based) sees the final normalized hidden state at position t, whose next token t+1 is the
model's own business, and guesses token t+1+k. Rooted heads see that next token too, as the first head of
Hydra does (Ankner et al. 2024, arXiv 2402.05109): it is decided when a draft begins.

    seen = heads.seen(hidden, roots)   # [..., D], with the roots' embeddings behind it where heads are rooted
    logits = heads(seen)               # [..., heads, vocabulary of the heads]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from linspec.drafters.trained import TrainedDrafter, check_drafted, read_accuracies, read_shape
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.utils.sizes import check_sizes

# of all heads together: published sets have up to 8
MOST_BLOCKS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    """The shape of a set of heads.

    width, vocab_size: of the target. blocks: residual blocks of each head. hidden: 0 for the
    paper's block x + silu(Wx + b), else the inner width of a block x + W2 silu(W1 x + b).
    shared_head: reuse the target's output matrix instead of a trained copy for each head. rooted: the first
    block also reads the embedding of the root. vocabulary: how many tokens can be drafted, 0 for all; fewer
    make a draft cheaper where the target's vocabulary is most of the work.
    """

    width: int
    vocab_size: int
    heads: int = 4
    blocks: int = 1
    hidden: int = 0
    shared_head: bool = True
    rooted: bool = False
    vocabulary: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size heads blocks")
        check_sizes(self, "hidden vocabulary", least=0)
        if self.vocabulary > self.vocab_size:
            raise ConfigError(
                f"heads cannot draft {self.vocabulary} tokens of the {self.vocab_size} that their target "
                "has; 0 is all"
            )
        if self.heads * self.blocks > MOST_BLOCKS:
            raise ConfigError(
                f"{self.heads} heads of {self.blocks} blocks are more than {MOST_BLOCKS} blocks; use "
                "fewer heads, such as 4"
            )


class HasHead(Protocol):
    """A model with embeddings and an output layer."""

    @property
    def embed(self) -> nn.Module:
        """From token ids to embeddings."""
        ...

    @property
    def head(self) -> nn.Module:
        """From hidden states to logits."""
        ...


class HeadBlock(nn.Module):
    """One residual block of every head at once: [..., heads, D] -> [..., heads, D].

    read: features that it reads; D, or more of which the first D are what it adds to.
    """

    def __init__(self, config: HeadsConfig, read: int) -> None:
        super().__init__()
        heads, width, inner = config.heads, config.width, config.hidden or config.width
        self.width = width
        self.weight = nn.Parameter(torch.zeros(heads, read, inner))
        self.bias = nn.Parameter(torch.zeros(heads, inner))
        if config.hidden:
            self.out = nn.Parameter(torch.zeros(heads, inner, width))
        else:
            self.register_parameter("out", None)

    def initialize(self, generator: torch.Generator) -> None:
        """Small weights where zeros would block the gradient; the block stays the identity."""
        if self.out is not None:
            std = self.weight.shape[1] ** -0.5
            with torch.no_grad():
                self.weight.normal_(0.0, std, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.silu(torch.einsum("...kd,kde->...ke", x, self.weight) + self.bias)
        if self.out is not None:
            inner = torch.einsum("...ke,ked->...kd", inner, self.out)
        return x[..., : self.width] + inner


class Heads(nn.Module, ABC):
    """All heads of one target, in whatever form.

    target: the model whose embeddings and output layer are used as they are when they are needed: it may be
    prepared later, and is not part of this module's weights. accuracies[k][i]: how often, on held-out text,
    the rank-i guess of head k+1 was what the target chose. drafted: the ids of the tokens that the heads
    choose among, None for all.
    """

    drafted: torch.Tensor | None

    def __init__(
        self,
        config: HeadsConfig,
        target: HasHead,
        accuracies: Sequence[Sequence[float]],
        drafted: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.accuracies = [list(row) for row in accuracies]
        if config.vocabulary and drafted is None:
            drafted = torch.arange(config.vocabulary, dtype=torch.int32)
        self.register_buffer("drafted", drafted if config.vocabulary else None)
        # in a tuple, so that it is not registered as a part
        self._target = (target,)

    def described(self) -> dict[str, Any]:
        """Shape and accuracies, in plain JSON types."""
        return {**asdict(self.config), "accuracies": self.accuracies}

    def check_weights(self, path: Path) -> None:
        """Raise DrafterError where what is drafted are no tokens of the target."""
        check_drafted(self.drafted, self.config.vocab_size, path)

    def bind(self, target: HasHead) -> None:
        """Draft for another form of the target, such as its quantized one."""
        self._target = (target,)

    @property
    def target(self) -> HasHead:
        """The model that the heads draft for."""
        return self._target[0]

    @property
    def target_head(self) -> nn.Module:
        """The target's output layer."""
        return self.target.head

    def seen(self, hidden: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
        """What the heads see of hidden states [..., D] and the token ids [...] behind them."""
        if not self.config.rooted:
            return hidden
        embeddings = self.target.embed(roots.to(hidden.device)).to(hidden.dtype)
        # of whatever scale embeddings are
        return torch.cat((hidden, F.rms_norm(embeddings, embeddings.shape[-1:])), dim=-1)

    def tokens(self, indices: torch.Tensor) -> torch.Tensor:
        """The token ids that indices of logits stand for."""
        return indices if self.drafted is None else self.drafted.long()[indices]

    @abstractmethod
    def features(self, seen: torch.Tensor) -> torch.Tensor:
        """What each head multiplies with its output matrix, [..., heads, D], of what it sees."""

    @abstractmethod
    def logits(self, features: torch.Tensor, head: int) -> torch.Tensor:
        """Logits of one head (0-based) from its features [..., D]."""

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        """Logits of all heads [..., heads, vocabulary]."""
        features = self.features(seen)
        if self.config.shared_head:
            return self.logits(features, 0)
        each = [self.logits(features[..., k, :], k) for k in range(self.config.heads)]
        return torch.stack(each, -2)

    def likely(
        self, hidden: torch.Tensor, roots: torch.Tensor, heads: int, top: int
    ) -> torch.Tensor:
        """The `top` likeliest tokens of the first `heads` heads, side by side [R, heads · top].

        hidden [R, D], and the token ids [R] behind them. It waits for no device.
        """
        best = self(self.seen(hidden, roots))[:, :heads].topk(top, dim=-1).indices
        return self.tokens(best).flatten(1)

    @torch.inference_mode()
    def guess(
        self, hidden: Sequence[torch.Tensor], roots: Sequence[int], heads: int, top: int
    ) -> list[list[int]]:
        """As `likely`, for rows [D] and their roots."""
        rows = torch.stack(list(hidden)), torch.tensor(roots)
        found: list[list[int]] = self.likely(*rows, heads, top).tolist()
        return found


class MedusaHeads(Heads, TrainedDrafter):
    """Heads that can be trained; after `initialize` each repeats the target's own next-token guess."""

    kind = "medusa"

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> MedusaHeads:
        config = read_shape(HeadsConfig, data, target, path)
        given = data.get("accuracies", [])
        accuracies = read_accuracies(given, config.heads, config.vocab_size, path)
        return cls(config, target, accuracies)

    def __init__(
        self,
        config: HeadsConfig,
        target: HasHead,
        accuracies: Sequence[Sequence[float]] = (),
        drafted: torch.Tensor | None = None,
    ) -> None:
        super().__init__(config, target, accuracies, drafted)
        first = config.width * (2 if config.rooted else 1)
        self.blocks = nn.ModuleList(
            HeadBlock(config, config.width if i else first) for i in range(config.blocks)
        )
        if not config.shared_head:
            outputs = config.vocabulary or config.vocab_size
            self.out = nn.Parameter(torch.zeros(config.heads, outputs, config.width))

    def initialize(self, generator: torch.Generator) -> None:
        """Make untrained heads ready for training."""
        for block in self.blocks:
            assert isinstance(block, HeadBlock)
            block.initialize(generator)
        if not self.config.shared_head:
            with torch.no_grad():
                self.out.copy_(self.target_rows())

    def target_rows(self) -> torch.Tensor:
        """The rows of the target's output matrix that are drafted from."""
        weight = cast(torch.Tensor, self.target_head.weight)
        return weight if self.drafted is None else weight[self.drafted.long()]

    def features(self, seen: torch.Tensor) -> torch.Tensor:
        x = seen[..., None, :].expand(*seen.shape[:-1], self.config.heads, seen.shape[-1])
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, features: torch.Tensor, head: int) -> torch.Tensor:
        if not self.config.shared_head:
            return F.linear(features, self.out[head])
        if self.drafted is not None:
            return F.linear(features, self.target_rows().to(features.dtype))
        return cast(torch.Tensor, self.target_head(features))
