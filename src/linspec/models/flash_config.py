"""The shape of a FLASH model (Hua et al. 2022): sizes of its units and which branches they have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig, RelativeConfig
from linspec.models.config import DecoderConfig
from linspec.utils.sizes import check_choice, check_sizes

VARIANTS = ("quadratic", "local", "grouped", "aug")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashConfig(DecoderConfig):
    """A stack of gated attention units; defaults are those of the paper's 110M model.

    variant: 'quadratic' attends to everything, 'local' inside groups of `group` tokens, 'grouped' also
    to a sum over earlier groups, 'aug' also through a convolution of `taps`. head_width: of queries
    and keys; mlp_width: of values and gate; turned: features of them that rotary positions turn.
    max_positions: tokens of a training window, and the most that 'quadratic' takes.
    """

    width: int = 768
    layers: int = 24
    heads: int = 1
    kv_heads: int = 1
    head_width: int = 128
    mlp_width: int = 1536
    family: str = "flash"
    positions: str = "relative"
    relative: RelativeConfig | None = field(default_factory=RelativeConfig)
    tied_embeddings: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-5
    max_positions: int = 1024
    variant: str = "aug"
    group: int = 256
    taps: int = 32
    turned: int = 32

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_sizes(self, "layers width head_width group turned")
        check_sizes(self, "taps", least=0)
        if (self.variant == "aug") != (self.taps > 0):
            raise ConfigError(
                f"variant {self.variant!r} with {self.taps} taps: 'aug' needs taps, such as 32, and "
                "the others take 0"
            )
        if self.turned % 2 or not 0 < self.turned <= self.head_width:
            raise ConfigError(
                f"turned must be an even number of features up to {self.head_width}, got {self.turned}"
            )
        if self.width % 2 or (self.heads, self.kv_heads) != (1, 1):
            raise ConfigError("a FLASH model has one head and an even width")
        group = self.max_positions if self.variant == "quadratic" else self.group
        unit = MixerConfig(name=f"flash-{self.variant}", group=group, taps=self.taps)
        object.__setattr__(self, "mixers", (unit,) * self.layers)
        DecoderConfig.__post_init__(self)
        self.check_plain("a FLASH model")

    @property
    def linear(self) -> bool:
        """True when the state does not grow with the context."""
        return self.variant != "quadratic"

    @property
    def position_limit(self) -> int | None:
        """Longest sequence in tokens, or None when only memory bounds it."""
        return None if self.linear else self.max_positions

    def with_mixers(self, mixers: tuple[MixerConfig, ...]) -> Self:
        """Not possible: raises ConfigError."""
        raise ConfigError(
            "the units of a FLASH model cannot be replaced by other mixers; train another variant"
        )
