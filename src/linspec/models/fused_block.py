"""A block that reads the token beside the state, as the drafters of the EAGLE family have it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from linspec.mixers.base import Rope
from linspec.mixers.config import StackConfig
from linspec.mixers.norms import make_norm
from linspec.models.block import Block
from linspec.models.norm import inference_norm
from linspec.state.dense_group import DenseGroup


class HasEmbedding(Protocol):
    """A model with embeddings."""

    @property
    def embed(self) -> nn.Module:
        """From token ids to embeddings."""
        ...


class BorrowedEmbedding(nn.Module):
    """The embeddings of another model, in the form that they have there now; no weights of this one."""

    def __init__(self, owner: HasEmbedding) -> None:
        super().__init__()
        # in a tuple, so that it is not registered as a part
        self._owner = (owner,)

    @property
    def source(self) -> nn.Module:
        """The embedding of the owner."""
        return self._owner[0].embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.source(ids)


class FusedBlock(Block):
    """A block whose x is [..., 2 D]: the embedding of a token, then a state [D] that belongs to it.

    The mixer reads both, each behind a norm of its own. What comes out is the state alone, a block further.
    """

    def __init__(self, config: StackConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.token_norm = make_norm(config)
        for name in ("q", "k", "v"):
            outputs = getattr(self.mixer, name).out_features
            layer_of = nn.Linear(2 * config.width, outputs, bias=config.qkv_bias)
            setattr(self.mixer, name, layer_of)

    def fused(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the mixer reads [..., 2 D], and the state that it adds to."""
        token, state = x.chunk(2, dim=-1)
        return torch.cat((self.token_norm(token), self.mixer_norm(state)), dim=-1), state

    def closed(self, state: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The state once the mixer has said what it adds."""
        state = state + mixed
        return state + self.mlp(self.mlp_norm(state))

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        read, state = self.fused(x)
        return self.closed(state, self.mixer(read, rope))

    def finalize_weights(self) -> None:
        super().finalize_weights()
        self.token_norm = inference_norm(self.token_norm)

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: Any,
        layer: int,
    ) -> torch.Tensor:
        read, own = self.fused(x)
        return self.closed(own, self.mixer.step(read, rope, dense_groups, state, layer))
