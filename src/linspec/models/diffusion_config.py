"""The shape of a masked-diffusion model: a decoder whose tokens see each other both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linspec.errors import ConfigError
from linspec.models.config import DecoderConfig
from linspec.utils.messages import quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionConfig(DecoderConfig):
    """A decoder without its causal mask.

    mask_id: the token that stands where nothing is decided yet. logit_shift: how many positions ahead of a
    token its logits stand: 0, or 1 for a model that was made from an autoregressive one.
    """

    mask_id: int
    logit_shift: int = 0

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        self.check_plain("a masked-diffusion model")
        for name, most in (("mask_id", self.vocab_size - 1), ("logit_shift", 1)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise ConfigError(
                    f"{name} must be a whole number from 0 to {most}, got {quoted(value)}"
                )

    @property
    def causal(self) -> bool:
        """Every token sees every other one."""
        return False

    def facts(self) -> dict[str, Any]:
        """What `linspec info MODEL` says of the shape and of how it writes."""
        how = {"decodes_by": "masked diffusion", "mask_id": self.mask_id}
        return DecoderConfig.facts(self) | how | {"logit_shift": self.logit_shift}
