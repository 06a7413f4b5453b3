"""What rows do to a linear state, and which rows a node reads through it."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.errors import ConfigError
from linspec.utils.messages import did_you_mean, shown

# feature maps of queries and keys
MAPS = ("same", "unit", "softmax", "relu", "elu_plus_1")


@dataclass(frozen=True, slots=True)
class Fading:
    """gates: columns of log a behind a key: 0 for a plain sum, 1 for one factor a head, else one a channel.
    delta: a row writes b (v - Sᵀ k), b behind log a, else its value. map: φ of queries and keys, one of MAPS.
    group, span: rows of the last `span` groups fade the state and do not write; 0: every row writes."""

    gates: int = 0
    delta: bool = False
    map: str = "same"
    group: int = 0
    span: int = 1

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise ConfigError(
                f"map must be one of {', '.join(MAPS)}, got {shown(repr(self.map))}"
                f"{did_you_mean(self.map, MAPS)}"
            )
        for name, least in (("gates", 0), ("group", 0), ("span", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def columns(self) -> int:
        """Columns of an entry's key behind the key itself."""
        return self.gates + self.delta
