"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): what they compute.

Head k (1-based) sees the final normalized hidden state at position t, whose next token t+1 is the
model's own business, and guesses token t+1+k.

    logits = heads(hidden)     # [..., D] -> [..., heads, vocab]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from linspec.errors import ConfigError
from linspec.utils.sizes import check_sizes

# of all heads together: published sets have up to 8
MOST_BLOCKS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    """The shape of a set of heads.

    width, vocab_size: of the target. blocks: residual blocks of each head. hidden: 0 for the
    paper's block x + silu(Wx + b), else the inner width of a block x + W2 silu(W1 x + b).
    shared_head: reuse the target's output matrix instead of a trained copy for each head.
    """

    width: int
    vocab_size: int
    heads: int = 4
    blocks: int = 1
    hidden: int = 0
    shared_head: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size heads blocks")
        check_sizes(self, "hidden", least=0)
        if self.heads * self.blocks > MOST_BLOCKS:
            raise ConfigError(
                f"{self.heads} heads of {self.blocks} blocks are more than {MOST_BLOCKS} blocks; use "
                "fewer heads, such as 4"
            )


class HasHead(Protocol):
    """A model with an output layer."""

    @property
    def head(self) -> nn.Module:
        """From hidden states to logits."""
        ...


class HeadBlock(nn.Module):
    """One residual block of every head at once: [..., heads, D] -> [..., heads, D]."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        heads, width, inner = config.heads, config.width, config.hidden or config.width
        self.weight = nn.Parameter(torch.zeros(heads, width, inner))
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
        return x + inner


class Heads(nn.Module, ABC):
    """All heads of one target, in whatever form.

    head: the target's output layer, which shared heads use as it is (it is not part of this
    module's weights). accuracies[k][i]: how often, on held-out text, the rank-i guess of head k+1
    was what the target chose.
    """

    def __init__(
        self, config: HeadsConfig, head: nn.Module, accuracies: Sequence[Sequence[float]]
    ) -> None:
        super().__init__()
        self.config = config
        self.accuracies = [list(row) for row in accuracies]
        self._target: tuple[Callable[[], nn.Module]]
        self.bind(head)

    def bind(self, head: nn.Module) -> None:
        """Use `head` as the target's output layer, such as its prepared form."""
        self._target = (lambda: head,)

    def follow(self, model: HasHead) -> None:
        """Use the output layer that `model` has when it is needed: it may be prepared later."""
        self._target = (lambda: model.head,)

    @property
    def target_head(self) -> nn.Module:
        """The target's output layer."""
        return self._target[0]()

    @abstractmethod
    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """What each head multiplies with its output matrix: [..., D] -> [..., heads, D]."""

    @abstractmethod
    def logits(self, features: torch.Tensor, head: int) -> torch.Tensor:
        """Logits [..., vocab] of one head (0-based) from its features [..., D]."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of all heads: hidden [..., D] -> [..., heads, vocab]."""
        features = self.features(hidden)
        if self.config.shared_head:
            return self.logits(features, 0)
        each = [self.logits(features[..., k, :], k) for k in range(self.config.heads)]
        return torch.stack(each, -2)

    @torch.inference_mode()
    def guess(self, hidden: Sequence[torch.Tensor], heads: int, top: int) -> list[list[int]]:
        """The `top` likeliest tokens of the first `heads` heads, side by side, for each row's [D]."""
        logits = self(torch.stack(list(hidden)))[:, :heads]
        found: list[list[int]] = logits.topk(top, dim=-1).indices.flatten(1).tolist()
        return found


class MedusaHeads(Heads):
    """Heads that can be trained; after `initialize` each repeats the target's own next-token guess."""

    def __init__(
        self, config: HeadsConfig, head: nn.Module, accuracies: Sequence[Sequence[float]] = ()
    ) -> None:
        super().__init__(config, head, accuracies)
        self.blocks = nn.ModuleList(HeadBlock(config) for _ in range(config.blocks))
        if not config.shared_head:
            self.out = nn.Parameter(torch.zeros(config.heads, config.vocab_size, config.width))

    def initialize(self, generator: torch.Generator) -> None:
        """Make untrained heads ready for training."""
        for block in self.blocks:
            assert isinstance(block, HeadBlock)
            block.initialize(generator)
        if not self.config.shared_head:
            with torch.no_grad():
                self.out.copy_(cast(torch.Tensor, self.target_head.weight))

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden[..., None, :].expand(*hidden.shape[:-1], self.config.heads, hidden.shape[-1])
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, features: torch.Tensor, head: int) -> torch.Tensor:
        if self.config.shared_head:
            return cast(torch.Tensor, self.target_head(features))
        return F.linear(features, self.out[head])
