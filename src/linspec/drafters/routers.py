"""Routers: one for each layer, which tell from a text whether its continuation needs the layer (FiRST).

    routers.needed(model, prompt)       # [layers], how much each is needed
    routers.skipped(needed)             # the layers to do without

Jain et al. 2024, arXiv 2410.12513. A router reads what enters its layer, brought to one scale. The first and
the last layer are always needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from linspec.decoding.step import StepInput, Want
from linspec.drafters.trained import TrainedDrafter, read_shape
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.border import parse
from linspec.utils.sizes import check_sizes

# of fresh routers, so that a model begins with nearly all of each layer
_BIAS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutersConfig:
    """width, vocab_size, layers: of the target. read: newest tokens of a text that are read."""

    width: int
    vocab_size: int
    layers: int
    read: int = 64

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size layers read")
        if self.layers < 3:
            raise ConfigError(
                f"routers keep the first and the last layer, and this model has {self.layers}; use a model "
                "of 3 layers or more"
            )


class Routers(TrainedDrafter):
    """The routers of one target. agreement: how often, on held-out text, a draft was the target's choice."""

    kind = "first"

    def __init__(self, config: RoutersConfig, target: Decoder) -> None:
        super().__init__()
        self.config = config
        # in a tuple, so that it is not registered as a part
        self._target = (target,)
        self.agreement = 0.0
        self.weight = nn.Parameter(torch.zeros(config.layers, config.width))
        self.bias = nn.Parameter(torch.full((config.layers,), _BIAS))

    def described(self) -> dict[str, Any]:
        return {**asdict(self.config), "agreement": self.agreement}

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> Self:
        config = read_shape(RoutersConfig, data, target, path)
        if config.layers != target.config.layers:
            raise DrafterError(
                f"the routers in {path.parent} are for {config.layers} layers, this model has "
                f"{target.config.layers}; train its own: linspec train-drafter --kind first"
            )
        made = cls(config, target)
        made.agreement = _share(data.get("agreement", 0.0), path)
        return made

    @property
    def target(self) -> Decoder:
        """The model that the routers were made for."""
        return self._target[0]

    def shares(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """How much each token needs `layer`, of what enters it [..., D]: [...] in 0..1."""
        if layer in (0, self.config.layers - 1):
            return x.new_ones(x.shape[:-1])
        scaled = F.rms_norm(x.to(self.weight.dtype), x.shape[-1:])
        return torch.sigmoid(scaled @ self.weight[layer] + self.bias[layer])

    @torch.inference_mode()
    def needed(self, model: Decoder, tokens: Sequence[int]) -> list[float]:
        """How much the end of a text needs each layer: the mean over its newest tokens."""
        layers = range(self.config.layers - 1)
        newest = StepInput(0, list(tokens[-self.config.read :]), all_logits=False)
        found = model.step([newest], model.new_state(), want=Want(tuple(layers)))
        behind = [self.shares(layer + 1, found.layers[layer]).mean() for layer in layers]
        return [1.0, *torch.stack(behind).tolist()]

    def skipped(self, needed: Sequence[float], count: int | None = None) -> frozenset[int]:
        """The `count` layers that are needed least; None: those that are needed less than by half."""
        inner = sorted(range(1, self.config.layers - 1), key=lambda layer: needed[layer])
        if count is None:
            count = sum(needed[layer] < 0.5 for layer in inner)
        return frozenset(inner[:count])


def _share(given: Any, path: Path) -> float:
    try:
        share = parse(float, given, f"{path}: agreement")
    except ConfigError as error:
        raise DrafterError(str(error)) from error
    if not 0 <= share <= 1:
        raise DrafterError(f"{path}: agreement must be a share in 0..1, got {share}")
    return share
