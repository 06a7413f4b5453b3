"""The embedding of tokens as a matrix in blocks, of which a row becomes floats when it is looked up."""

from __future__ import annotations

import torch
from torch import nn

from linspec.kernels.cpu.blocks import block_rows
from linspec.kernels.cpu.library import load
from linspec.kernels.gpu.plain.blocks import block_outputs
from linspec.kernels.step_plan import LinearPlan
from linspec.models.native_linear import NativeLinear


class BlockEmbedding(nn.Module):
    """Rows of the weights of `layer`, often the output layer itself; inference only."""

    def __init__(self, layer: NativeLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.out_features, layer.in_features
        self.layer = layer

    def plan(self) -> LinearPlan:
        """The matrix as kernels see it."""
        return self.layer.plan()

    @property
    def weight(self) -> torch.Tensor:
        """The float32 table [tokens, width]; a new tensor."""
        return self.layer.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.device.type != "cpu":
            rows = block_outputs(self.plan(), ids.flatten())
            return rows.view(*ids.shape, self.embedding_dim)
        library = load().library
        assert library is not None, "blocks are kept only where the library is"
        return block_rows(library, self.plan(), ids.flatten()).view(*ids.shape, self.embedding_dim)
