"""What a Hugging Face family is: configurations and tensor names, both ways.

Tensor names are a table of module names; only GPT-2 needs more than renaming, because it stores
weights transposed and q, k, v fused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from linspec.errors import UnsupportedModel
from linspec.mixers.config import StackConfig
from linspec.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Tensors = dict[str, torch.Tensor]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One module's name there and here; `{}` is the layer. Several of ours are fused in theirs."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One Hugging Face `model_type`.

    prefix: what checkpoints saved without the head lack; bare: whether a configuration is saved so.
    more: rules that depend on the configuration. ignored: ends of names that may be left out.
    renamed: ends of names in old checkpoints, and now. adapt: corrects a configuration by the names
    of the tensors found, where config.json leaves something open.
    """

    name: str
    architecture: str
    prefix: str
    rules: tuple[Rule, ...]
    read: Callable[[PreTrainedConfig], ModelConfig]
    write: Callable[[Any], dict[str, Any]]
    more: Callable[[Any], tuple[Rule, ...]] = lambda config: ()
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    bare: Callable[[Any], bool] = lambda config: False
    adapt: Callable[[Any, Collection[str]], ModelConfig] = lambda config, names: config

    def on_disk(self, tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
        """Our state dict as this family saves it."""
        named = self.to_theirs(tensors, config)
        if not self.bare(config):
            return named
        return {name.removeprefix(self.prefix): tensor for name, tensor in named.items()}

    def current(self, name: str) -> str:
        """A name on disk as it is written today."""
        for old, new in self.renamed:
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def to_theirs(self, tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
        """Our state dict under their names."""
        found: Tensors = {}
        for theirs, ours, rule in self._names(config):
            if ours[0] in tensors:
                parts = [tensors[name] for name in ours]
                whole = parts[0] if len(parts) == 1 else torch.cat(parts)
                found[theirs] = _turned(whole, rule)
        return found

    def to_ours(self, tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
        """The inverse of `to_theirs`."""
        found: Tensors = {}
        for theirs, ours, rule in self._names(config):
            if theirs in tensors:
                parts = _turned(tensors[theirs], rule).chunk(len(ours))
                found.update(zip(ours, parts, strict=True))
        return found

    def _names(self, config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], Rule]]:
        for rule in (*self.rules, *self.more(config)):
            for layer in range(config.layers if "{}" in rule.theirs else 1):
                for kind in (".weight", ".bias"):
                    ours = tuple(name.format(layer) + kind for name in rule.ours)
                    yield rule.theirs.format(layer) + kind, ours, rule


def _turned(tensor: torch.Tensor, rule: Rule) -> torch.Tensor:
    return tensor.t().contiguous() if rule.transposed and tensor.ndim == 2 else tensor


def read_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` is a number, a list or missing."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def activation_here(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def activation_there(config: StackConfig, tanh: str) -> str:
    return tanh if config.activation == "gelu_tanh" else config.activation
