"""The shape of a decoder: every switch that tells one model family from another."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from linspec.errors import ConfigError

KERNELS = ("own", "softmax", "relu2")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerConfig:
    """Which mixer a layer uses, and its sizes.

    group: tokens per group of the grouped linear mixers. span: groups that a token sees exactly, its
    own open one included; earlier ones it sees as a sum. kernel: how the exact part weighs tokens,
    'own' for the mixer's own weights, 'softmax' for those of the pretrained model, 'relu2' for
    relu(q̂·k̂)²; the latter two make any linear mixer grouped, with a learned share α of its sum.
    taps: causal convolution taps over values; 0 means no convolution.
    window: tokens that the `window` mixer sees, the current one included.
    features: random features of `performer` and `rfa`, rows that `linformer` makes of a group; 0 for
    the mixer's default. keep: closed groups that `linformer` remembers; 0 for its default.
    seed: of what a mixer draws at random when it is made.
    """

    name: str = "softmax"
    group: int = 64
    span: int = 1
    kernel: str = "own"
    taps: int = 0
    window: int = 0
    features: int = 0
    keep: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ConfigError(f"group size must be 1 or more, got {self.group}")
        if self.span < 1:
            raise ConfigError(f"span must be 1 or more groups, got {self.span}")
        if self.kernel not in KERNELS:
            raise ConfigError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        if self.taps < 0:
            raise ConfigError(f"convolution taps must be 0 or more, got {self.taps}")
        for name in ("features", "keep", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.name == "window" and self.window < 1:
            raise ConfigError(
                f"mixer 'window' needs a window of 1 or more tokens, got {self.window}"
            )

    def chosen(self) -> dict[str, Any]:
        """The settings that differ from the defaults: the same when later versions add more."""
        every = asdict(self)
        return {f.name: every[f.name] for f in fields(self) if every[f.name] != f.default}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `kind` is 'default', 'linear' or 'llama3'."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ConfigError(
                f"rope scaling {self.kind!r} is not supported; supported: default, linear, llama3"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Everything needed to build a decoder.

    Widths are in features, `max_positions` in tokens. `mixers` has one entry for each layer.
    `family` remembers which Hugging Face family the weights came from, for saving back.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    mixers: tuple[MixerConfig, ...] = ()
    family: str = "llama"
    norm: str = "rms"
    norm_eps: float = 1e-6
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    positions: str = "rope"
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if not self.mixers:
            object.__setattr__(self, "mixers", (MixerConfig(),) * self.layers)
        for name in (
            "vocab_size",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "head_width",
            "mlp_width",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if len(self.mixers) != self.layers:
            raise ConfigError(f"{len(self.mixers)} mixers given for {self.layers} layers")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if self.norm not in ("rms", "layer"):
            raise ConfigError(f"norm must be 'rms' or 'layer', got {self.norm!r}")
        if self.positions not in ("rope", "learned"):
            raise ConfigError(f"positions must be 'rope' or 'learned', got {self.positions!r}")

    @property
    def linear(self) -> bool:
        """True when no layer keeps a cache that grows with the context."""
        return all(m.name != "softmax" for m in self.mixers)

    @property
    def position_limit(self) -> int | None:
        """Longest sequence in tokens, or None when only memory bounds it."""
        if self.positions == "learned" or not self.linear:
            return self.max_positions
        return None

    def with_mixers(self, mixers: tuple[MixerConfig, ...]) -> DecoderConfig:
        """The same decoder with other mixers."""
        return replace(self, mixers=mixers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecoderConfig:
        """The inverse of `to_dict`; raises ConfigError on unknown or missing keys."""
        known = dict(data)
        try:
            known["mixers"] = tuple(MixerConfig(**m) for m in known.get("mixers", ()))
            known["rope"] = RopeConfig(**known.get("rope", {}))
            known["eos_ids"] = tuple(known.get("eos_ids", ()))
            return cls(**known)
        except TypeError as error:
            raise ConfigError(f"not a decoder configuration: {error}") from error
