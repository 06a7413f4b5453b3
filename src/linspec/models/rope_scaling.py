"""A decoder for longer texts than it was trained on: what `--rope-scaling` names.

    model = with_rope_scaling(load_model("smollm2"), "yarn:4")     # 32,768 positions instead of 8,192

The weights are those of the model, which has not seen such positions: what it makes of them is to be
measured.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

from linspec.errors import ConfigError
from linspec.mixers.rope import Rotary
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.own_forms import again, ready
from linspec.utils.messages import shown
from linspec.utils.options import option
from linspec.utils.registry import Registry

_log = logging.getLogger("linspec")

ROPE_SCALINGS: Registry[object] = Registry("rope scaling")


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorOptions:
    """How much longer."""

    factor: float = option("how many times as many positions", short=True)

    def __post_init__(self) -> None:
        if not 1 < self.factor <= 1024:
            raise ConfigError(f"factor must be above 1 and at most 1024, got {self.factor}")


@ROPE_SCALINGS.register(
    "yarn",
    summary="slow waves are stretched, fast ones kept, scores a little sharper",
    paper="Peng et al. 2023 (YaRN), arXiv 2309.00071",
    options=FactorOptions,
)
class Yarn:
    """See `with_rope_scaling`."""


@ROPE_SCALINGS.register(
    "linear",
    summary="all positions are divided by the factor",
    paper="Chen et al. 2023 (position interpolation), arXiv 2306.15595",
    options=FactorOptions,
)
class Linear:
    """See `with_rope_scaling`."""


def with_rope_scaling(model: Decoder, spec: str | None) -> Decoder:
    """`model` with so many times its positions, or the model itself where no spec is given.

    Raises ConfigError for an unknown scaling, and for a model whose positions cannot be scaled so.
    """
    if spec is None:
        return model
    config = scaled_config(model.config, spec)
    made = again(model)
    made.config, made.position_limit = config, config.position_limit
    made.rotary = Rotary(config.rope, config.head_width)
    _log.warning(
        "rope scaling %s: %s positions, of which the model was trained for %s",
        spec,
        config.max_positions,
        model.config.max_positions,
    )
    return ready(made)


def scaled_config(config: DecoderConfig, spec: str) -> DecoderConfig:
    """The settings of a model that is read with this scaling."""
    entry, options = ROPE_SCALINGS.read(spec)
    if config.positions != "rope" or config.local_rope is not None or config.rope.kind != "default":
        kind = config.positions if config.positions != "rope" else f"rope ({config.rope.kind})"
        raise ConfigError(
            f"rope_scaling={shown(repr(spec))} is for models whose rotary positions are one kind, unscaled; "
            f"this one has {kind}{' in two kinds' if config.local_rope is not None else ''}. Leave it out"
        )
    return replace(
        config,
        rope=_scaled(config.rope, entry.name, options.factor, config.max_positions),
        max_positions=round(config.max_positions * options.factor),
    )


def _scaled(rope: RopeConfig, kind: str, factor: float, positions: int) -> RopeConfig:
    # the paper's temperature, on cosines and sines of queries and keys alike
    sharper = 1 + 0.1 * math.log(factor) if kind == "yarn" else 1.0
    return replace(
        rope,
        kind=kind,
        factor=factor,
        original_max_positions=positions,
        attention_factor=sharper,
    )
