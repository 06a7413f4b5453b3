"""What the stacks of all backbones are made of: a mixer and an MLP with their norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linspec.errors import ConfigError
from linspec.mixers import MIXERS, Mixer
from linspec.mixers.base import Rope
from linspec.mixers.config import StackConfig
from linspec.mixers.norms import make_norm
from linspec.mixers.projections import LinearFactory
from linspec.models.norm import inference_norm
from linspec.state.contract import Makers
from linspec.state.dense_group import DenseGroup

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """Gated (SwiGLU, Shazeer 2020) or plain feed-forward layer."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation {config.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated_mlp
        if self.gated:
            self.gate: nn.Module = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up: nn.Module = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down: nn.Module = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

        self.gate_up: nn.Module | None = None

    def to_inference(self, linear_factory: LinearFactory) -> None:
        """Replace the layers by their inference form: one product for gate and up."""
        if self.gated:
            self.gate_up = linear_factory(self.gate, self.up)
            del self.gate, self.up
        else:
            self.up = linear_factory(self.up)
        self.down = linear_factory(self.down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_up is not None:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)
        if self.gated:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: StackConfig, layer: int) -> None:
        super().__init__()
        mixer = config.mixers[layer]
        self.mixer_norm = make_norm(config)
        self.mixer: Mixer = MIXERS[mixer.name](config, mixer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        x = x + self.mixer(self.mixer_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))

    def state_makers(self) -> Makers:
        """Who makes what this block remembers of the committed tokens."""
        return self.mixer.state_makers()

    def to_inference(self, linear_factory: LinearFactory) -> None:
        """Replace every part by its inference form."""
        self.mixer.to_inference(linear_factory)
        self.mlp.to_inference(linear_factory)

    def finalize_weights(self) -> None:
        """Compute what depends on the weights, once these are final."""
        self.mixer.finalize_weights()
        self.mixer_norm, self.mlp_norm = (
            inference_norm(self.mixer_norm),
            inference_norm(self.mlp_norm),
        )

    def step(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: Any,
        layer: int,
    ) -> torch.Tensor:
        """The step form over packed nodes [M, D]."""
        x = x + self.mixer.step(self.mixer_norm(x), rope, dense_groups, state, layer)
        return x + self.mlp(self.mlp_norm(x))
