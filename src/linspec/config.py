"""The shapes of all stacks: every switch that tells one model family from another."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from linspec.border import parse
from linspec.errors import ConfigError
from linspec.messages import did_you_mean, shown

KERNELS = ("own", "softmax", "relu2")
HEADS = ("none", "pooler", "masked-lm", "classifier")
# what `parse` lets a JSON object of these classes hold: nothing that they do not know
STRICT = {"extra": "forbid"}
# the largest of each size that is believed: far beyond every model there is, far below what makes
# a shape hang or a product of sizes leave 64 bits
MOST = 2**31 - 1
LARGEST = {
    "vocab_size": 2**24,
    "width": 2**20,
    "layers": 2**10,
    "heads": 2**14,
    "kv_heads": 2**14,
    "head_width": 2**16,
    "mlp_width": 2**24,
    "blocks": 2**8,
    "taps": 2**16,
    "features": 2**20,
    "group": 2**24,
    "span": 2**24,
    "seed": 2**63 - 1,
    "max_batch": 2**16,
    "draft nodes": 10**9,
}


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
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_sizes(self, "group span")
        check_sizes(self, "taps window features keep seed", least=0)
        check_choice("kernel", self.kernel, KERNELS)
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
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ConfigError(
                f"rope scaling {self.kind!r} is not supported; supported: default, linear, llama3"
            )
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            check_positive(f"rope {name}", getattr(self, name))
        check_sizes(self, "original_max_positions")
        if self.kind == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ConfigError(
                f"rope low_freq_factor and high_freq_factor are both {self.low_freq_factor}; "
                "llama3 scaling needs two different ones, such as 1 and 4"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativeConfig:
    """Learned bias by distance (T5, Raffel et al. 2020).

    buckets: distances told apart; max_distance: beyond it all distances in tokens are one.
    """

    buckets: int = 32
    max_distance: int = 128
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_sizes(self, "buckets max_distance")
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ConfigError(
                "a relative bias needs 4 or more buckets and a max_distance above half of them, "
                f"got {self.buckets} and {self.max_distance}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """What the stacks of all backbones have: blocks of a mixer and an MLP.

    Widths are in features, `max_positions` in tokens. `mixers` has one entry for each layer.
    `family` remembers which Hugging Face family the weights came from, for saving back.
    relative: a bias by distance, with positions 'relative'. scaled_scores: softmax scores are divided
    by √head_width.
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
    positions: str = "rope"
    rope: RopeConfig = field(default_factory=RopeConfig)
    relative: RelativeConfig | None = None
    scaled_scores: bool = True
    max_positions: int = 2048
    pad_id: int | None = None
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size width layers heads kv_heads head_width mlp_width")
        check_sizes(self, "max_positions")
        check_positive("norm_eps", self.norm_eps, zero=True)
        if not self.mixers:
            object.__setattr__(self, "mixers", (MixerConfig(),) * self.layers)
        if self.heads * self.head_width > LARGEST["width"]:
            raise ConfigError(
                f"{self.heads} heads of {self.head_width} features are more than {LARGEST['width']} "
                "features; check heads and head_width"
            )
        if len(self.mixers) != self.layers:
            raise ConfigError(f"{len(self.mixers)} mixers given for {self.layers} layers")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if self.norm not in ("rms", "layer"):
            raise ConfigError(f"norm must be 'rms' or 'layer', got {self.norm!r}")
        if self.positions not in ("rope", "learned", "relative"):
            raise ConfigError(
                f"positions must be 'rope', 'learned' or 'relative', got {self.positions!r}"
            )
        if (self.positions == "relative") != (self.relative is not None):
            raise ConfigError(
                f"positions {self.positions!r} with relative={self.relative}: a relative bias goes "
                "with positions 'relative' and with no other"
            )

    @property
    def causal(self) -> bool:
        """True when no token sees a later one."""
        return True

    @property
    def score_scale(self) -> float:
        """Factor on q·k products ahead of a softmax."""
        return self.head_width**-0.5 if self.scaled_scores else 1.0

    @property
    def linear(self) -> bool:
        """True when no layer keeps a cache that grows with the context."""
        return all(m.name != "softmax" for m in self.mixers)

    @property
    def position_limit(self) -> int | None:
        """Longest sequence in tokens, or None when only memory bounds it."""
        if self.positions == "learned" or (self.positions == "rope" and not self.linear):
            return self.max_positions
        return None

    def with_mixers(self, mixers: tuple[MixerConfig, ...]) -> Self:
        """The same stack with other mixers."""
        return replace(self, mixers=mixers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; raises ConfigError on unknown, missing or mistyped entries."""
        return parse(cls, data, f"not a {cls.__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(StackConfig):
    """Everything needed to build a decoder.

    logit_scale: factor on the final hidden states ahead of the output layer.
    """

    tied_embeddings: bool = True
    logit_scale: float = 1.0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        StackConfig.__post_init__(self)
        check_positive("logit_scale", self.logit_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig(StackConfig):
    """Everything needed to build an encoder.

    post_norm: norms follow their residual sums, and the embeddings, as in BERT; else they precede
    the mixer and the MLP, and one closes the stack, as in T5. token_types: kinds of segments that
    tokens can be of, 0 for none. head: 'none', 'pooler', 'masked-lm' or 'classifier', which has one
    output for each of `labels`.
    """

    post_norm: bool = True
    token_types: int = 0
    head: str = "none"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        StackConfig.__post_init__(self)
        check_sizes(self, "token_types", least=0)
        check_choice("head", self.head, HEADS)
        if (self.head == "classifier") != bool(self.labels):
            raise ConfigError(
                f"head {self.head!r} with labels {self.labels}: a classifier needs labels"
            )

    @property
    def causal(self) -> bool:
        """Every token sees every other one."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqConfig:
    """An encoder, and a decoder that attends to it. start_id: the token that every output begins with."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    family: str = "t5"
    start_id: int = 0
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width"):
            ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if ours != theirs:
                raise ConfigError(f"the encoder's {name} is {ours}, the decoder's {theirs}")
        check_sizes(self, "start_id", least=0)
        if self.start_id >= self.vocab_size:
            raise ConfigError(f"start_id {self.start_id} is none of {self.vocab_size} tokens")

    @property
    def vocab_size(self) -> int:
        """Tokens that both sides know."""
        return self.decoder.vocab_size

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        return self.decoder.eos_ids

    @property
    def position_limit(self) -> int | None:
        """Longest output in tokens, or None when only memory bounds it."""
        return self.decoder.position_limit

    @property
    def layers(self) -> int:
        """Blocks of the deeper side."""
        return max(self.encoder.layers, self.decoder.layers)

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The encoder's mixers, then those of the decoder."""
        return self.encoder.mixers + self.decoder.mixers

    def with_mixers(self, mixers: tuple[MixerConfig, ...]) -> Self:
        """The same model with other mixers, in the order of `mixers`."""
        border = self.encoder.layers
        return replace(
            self,
            encoder=self.encoder.with_mixers(mixers[:border]),
            decoder=self.decoder.with_mixers(mixers[border:]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; raises ConfigError on unknown, missing or mistyped entries."""
        return parse(cls, data, f"not a {cls.__name__}")


def check_sizes(config: object, names: str, *, least: int = 1) -> None:
    """Raise ConfigError unless every one of the named (space-separated) sizes is a sound one."""
    for name in names.split():
        check_size(name, getattr(config, name), least=least)


def check_size(name: str, value: object, *, least: int = 1) -> None:
    """Raise ConfigError unless `value` is a whole number from `least` to the largest believed."""
    most = LARGEST.get(name, MOST)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a whole number, got {shown(value)}")
    if value < least:
        raise ConfigError(f"{name} must be {least} or more, got {shown(value)}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most}, got {shown(value)}")


def check_positive(name: str, value: object, *, zero: bool = False) -> None:
    """Raise ConfigError unless `value` is a finite number above 0, or 0 where that is allowed."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
    if not 0 < number < math.inf and not (zero and number == 0):
        rule = "0 or more" if zero else "above 0"
        raise ConfigError(f"{name} must be finite and {rule}, got {shown(value)}")


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of the `known` words."""
    if value not in known:
        raise ConfigError(
            f"{name} must be one of {', '.join(known)}, got {shown(repr(value))}"
            f"{did_you_mean(value, known)}"
        )
