"""One decoder for Llama, Mistral, Qwen2, Qwen3, SmolLM and GPT-2: blocks of mixer and MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from linspec.errors import ConfigError
from linspec.mixers import MIXERS
from linspec.mixers.base import Rope
from linspec.models.config import DecoderConfig
from linspec.models.rope import Rotary

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def make_norm(config: DecoderConfig) -> nn.Module:
    """The configured normalisation over the model width."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.width, eps=config.norm_eps)


class MLP(nn.Module):
    """Gated (SwiGLU, Shazeer 2020) or plain feed-forward layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation {config.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated_mlp
        if self.gated:
            self.gate = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        mixer = config.mixers[layer]
        self.mixer_norm = make_norm(config)
        self.mixer = MIXERS[mixer.name](config, mixer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        x = x + self.mixer(self.mixer_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Token ids in, logits out. `forward` is the full form, `step` the inference form."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.width)
        else:
            self.rotary = Rotary(config.rope, config.head_width)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Final normalised hidden states [B, T, D] of ids [B, T] at positions 0..T-1."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x, rope = self.embed(ids), None
        if self.config.positions == "learned":
            x = x + self.embed_positions(positions)
        else:
            rope = self.rotary(positions, x.dtype)
        for block in self.blocks:
            x = block(x, rope)
        return self.norm(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocab] of ids [B, T]."""
        return self.head(self.hidden(ids))
