"""What rotary positions are: how fast which features of a head turn."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.errors import ConfigError
from linspec.utils.border import STRICT
from linspec.utils.sizes import check_positive, check_sizes

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    kind: how the frequencies are scaled, one of ROPE_KINDS. factor: of 'linear', 'llama3' and 'yarn';
    low_freq_factor and high_freq_factor of 'llama3', beta_fast, beta_slow and truncate of 'yarn'.
    original_max_positions: of the training before the scaling. partial_rotary_factor: share of each head that
    turns, from its first feature on. attention_factor: on cosines and sines.

    'dynamic' changes nothing up to the model's last position, and there is none behind it; factor is kept for
    saving. 'longrope' divides each frequency by an entry of short_factors, or of long_factors if `long`: one
    choice for all texts of a model, because keys that a cache holds cannot turn again.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    partial_rotary_factor: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long: bool = False
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(
                f"rope scaling {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
            )
        numbers = (
            "theta factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow"
        )
        for name in numbers.split():
            check_positive(f"rope {name}", getattr(self, name))
        check_sizes(self, "original_max_positions")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope low_freq_factor is {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; the high one is above the low one, such as 1 and 4"
            )
        if self.kind == "yarn" and self.theta == 1.0:
            raise ConfigError(
                "rope theta is 1, where all features turn alike; yarn scaling needs another"
            )
        check_positive("rope partial_rotary_factor", self.partial_rotary_factor)
        if self.partial_rotary_factor > 1:
            raise ConfigError(
                f"rope partial_rotary_factor must be above 0 and at most 1, got {self.partial_rotary_factor}"
            )
        for name in ("short_factors", "long_factors"):
            for number in getattr(self, name):
                check_positive(f"rope {name}", number)

    @property
    def note(self) -> str | None:
        """Where the logits are not those of transformers, in a sentence; None where they are."""
        if not self.long or self.short_factors == self.long_factors:
            return None
        return (
            "LongRoPE turns all texts by long_factor; the logits of texts of up to "
            f"{self.original_max_positions} tokens differ from those of transformers, which takes "
            "short_factor there; docs/families.md says how to get these"
        )

    def turned(self, head_width: int) -> int:
        """Features of a head that turn."""
        return int(head_width * self.partial_rotary_factor)

    def check_heads(self, head_width: int) -> None:
        """Raise ConfigError unless heads of this width can turn so."""
        turned = self.turned(head_width)
        if self.partial_rotary_factor != 1.0 and (turned < 2 or turned % 2):
            raise ConfigError(
                f"rope partial_rotary_factor {self.partial_rotary_factor} turns {turned} of {head_width} "
                "features of a head; it must be an even number of 2 or more"
            )
        for name in ("short_factors", "long_factors") if self.kind == "longrope" else ():
            count = len(getattr(self, name))
            if count != turned // 2:
                raise ConfigError(
                    f"rope {name} has {count} numbers; heads that turn {turned} features need {turned // 2}"
                )
