"""What a Hugging Face family is: configurations and tensor names, both ways.

Tensor names are a table of module names. Some families store weights transposed, or several layers in one.
A family is one file of this folder that calls `register`; see docs/adding-a-family.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from linspec.errors import UnsupportedModel
from linspec.mixers.config import StackConfig
from linspec.models.config import ModelConfig
from linspec.utils.sizes import check_positive

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
    """One module's name there and here; `{}` is the layer. Several of ours are fused in theirs.

    transposed: their matrices are [inputs, outputs]. sizes: rows of each of ours, from the configuration;
    equal without. by_head: rows of all of ours alternate, head by head. A `*` in theirs is a row of ours.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    sizes: Callable[[Any], Sequence[int]] | None = None
    by_head: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One Hugging Face `model_type`.

    prefix: what checkpoints saved without the head lack; bare: whether a configuration is saved so.
    more: rules that depend on the configuration. ignored: ends of names that may be left out.
    renamed: ends of names in old checkpoints, and now. adapt: corrects a configuration by the names
    of the tensors found, where config.json leaves something open. settings: makes a configuration of what
    config.json says, of a family that transformers does not know; None asks transformers.
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
    settings: Callable[..., PreTrainedConfig] | None = None

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
                whole = _fused([tensors[name] for name in ours], rule, config)
                found.update(_as_stored(theirs, whole, rule))
        return found

    def to_ours(self, tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
        """The inverse of `to_theirs`."""
        found: Tensors = {}
        for theirs, ours, rule in self._names(config):
            whole = _stored(theirs, tensors, rule)
            if whole is not None:
                found.update(zip(ours, _parts(whole, rule, config), strict=True))
        return found

    def _names(self, config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], Rule]]:
        for rule in (*self.rules, *self.more(config)):
            for layer in range(config.layers if "{}" in rule.theirs else 1):
                for kind in (".weight", ".bias"):
                    ours = tuple(name.format(layer) + kind for name in rule.ours)
                    yield rule.theirs.format(layer) + kind, ours, rule


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known under its name; returns it."""
    FAMILIES[family.name] = family
    return family


def qkv_rows(config: Any) -> tuple[int, int, int]:
    """Rows of queries, keys and values that are fused in one matrix."""
    width = config.head_width
    return config.heads * width, config.kv_heads * width, config.kv_heads * width


def _fused(parts: list[torch.Tensor], rule: Rule, config: Any) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    if not rule.by_head:
        return torch.cat(parts)
    return torch.stack([p.unflatten(0, (config.heads, -1)) for p in parts], dim=1).flatten(0, 2)


def _parts(whole: torch.Tensor, rule: Rule, config: Any) -> Sequence[torch.Tensor]:
    if rule.by_head:
        heads = whole.unflatten(0, (config.heads, len(rule.ours), -1))
        return [part.flatten(0, 1) for part in heads.unbind(1)]
    if rule.sizes is not None:
        return whole.split(tuple(rule.sizes(config)))
    return whole.chunk(len(rule.ours))


def _as_stored(name: str, whole: torch.Tensor, rule: Rule) -> Tensors:
    """One tensor, or one for each row, under their names."""
    if "*" in name:
        return {name.replace("*", str(row)): part.clone() for row, part in enumerate(whole)}
    return {name: _turned(whole, rule)}


def _stored(name: str, tensors: Mapping[str, torch.Tensor], rule: Rule) -> torch.Tensor | None:
    """The inverse of `_as_stored`; None where there is no such tensor."""
    if "*" not in name:
        return _turned(tensors[name], rule) if name in tensors else None
    rows: list[torch.Tensor] = []
    while (row := name.replace("*", str(len(rows)))) in tensors:
        rows.append(tensors[row])
    return torch.stack(rows) if rows else None


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


def positive(hf: PreTrainedConfig, key: str) -> float:
    """A number of a configuration that must be above 0; raises ConfigError that names it."""
    value = getattr(hf, key)
    check_positive(key, value)
    return float(value)


def activation_there(config: StackConfig, tanh: str) -> str:
    return tanh if config.activation == "gelu_tanh" else config.activation
