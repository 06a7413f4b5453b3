"""The shape of a masked-diffusion model: a decoder whose tokens see each other both ways."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from linspec.errors import ConfigError
from linspec.models.config import DecoderConfig
from linspec.utils.messages import quoted
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionConfig(DecoderConfig):
    """A decoder without its causal mask.

    mask_id: the token that stands where nothing is decided yet. logit_shift: how many positions ahead of a
    token its logits stand: 0, or 1 for a model that was made from an autoregressive one. block_length: of a
    block-diffusion model, whose tokens see their own block of so many positions and those before it (Arriola
    et al. 2025, arXiv 2503.09573); None for one that sees the whole text.
    """

    mask_id: int
    logit_shift: int = 0
    block_length: int | None = None

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        self.check_plain("a masked-diffusion model")
        for name, most in (("mask_id", self.vocab_size - 1), ("logit_shift", 1)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise ConfigError(
                    f"{name} must be a whole number from 0 to {most}, got {quoted(value)}"
                )

        if self.block_length is not None:
            self._check_blocks()

    def _check_blocks(self) -> None:
        check_size("block_length", self.block_length)
        others = sorted({mixer.name for mixer in self.mixers} - {"softmax"})
        if others or self.logit_shift:
            raise ConfigError(
                f"a model with block_length has softmax mixers and logit_shift 0, got mixers {others} and "
                f"logit_shift {self.logit_shift}; leave block_length out"
            )

    @classmethod
    def of(cls, decoder: DecoderConfig, **changes: Any) -> Self:
        """The shape of `decoder` without its causal mask; `changes` are entries of this class."""
        known = {each.name: getattr(decoder, each.name) for each in fields(DecoderConfig)}
        return cls(**known | changes)

    def decoder(self) -> DecoderConfig:
        """The decoder of this shape."""
        return DecoderConfig(
            **{each.name: getattr(self, each.name) for each in fields(DecoderConfig)}
        )

    @property
    def causal(self) -> bool:
        """Every token sees every other one."""
        return False

    def facts(self) -> dict[str, Any]:
        """What `linspec info MODEL` says of the shape and of how it writes."""
        how = {"decodes_by": "masked diffusion", "mask_id": self.mask_id}
        blocks = {} if self.block_length is None else {"block_length": self.block_length}
        return DecoderConfig.facts(self) | how | {"logit_shift": self.logit_shift} | blocks
