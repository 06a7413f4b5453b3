"""The shapes of all stacks: every switch that tells one model family from another."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, TypeVar

from linspec.errors import ConfigError
from linspec.mixers.rope_config import RopeConfig
from linspec.utils.border import STRICT, parse
from linspec.utils.messages import shown
from linspec.utils.sizes import LARGEST, check_choice, check_positive, check_size, check_sizes

T = TypeVar("T")

KERNELS = ("own", "softmax", "relu2")
# what has a norm of queries and keys of its own: all heads alike, the whole projection, each head
QK_NORMS = ("head", "whole", "each")
# mixers whose caches hold every token
_KEEP_ALL = ("softmax", "pages", "delta", "tidal", "shadow")
# settings that came after the first runs and cells were kept
_LATER = ("sinks", "exact_heads", "options")


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
    sinks: first tokens of a text that `streaming` sees from everywhere. exact_heads: KV heads that
    `by-head` gives softmax attention.
    options: further settings of one mixer, such as one that another package brings; see `own_options`.
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
    sinks: int = 0
    exact_heads: tuple[int, ...] = ()
    options: dict[str, bool | int | float | str | None] = field(default_factory=dict, hash=False)
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_sizes(self, "group span")
        check_sizes(self, "taps window features keep seed sinks", least=0)
        check_heads(self.exact_heads)
        check_choice("kernel", self.kernel, KERNELS)
        if self.name == "window" and self.window < 1:
            raise ConfigError(
                f"mixer 'window' needs a window of 1 or more tokens, got {self.window}"
            )

    @property
    def grows(self) -> bool:
        """Whether it keeps a cache that grows with the context."""
        return self.name in _KEEP_ALL or bool(self.exact_heads)

    def recorded(self) -> dict[str, Any]:
        """Its settings as runs and study cells are known by: without later ones that are not used."""
        found = asdict(self)
        return {k: v for k, v in found.items() if k not in _LATER or v}

    def chosen(self) -> dict[str, Any]:
        """The settings that differ from the defaults: the same when later versions add more."""
        usual = asdict(MixerConfig())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    def own_options(self, kind: type[T]) -> T:
        """`options` as the dataclass `kind` of a mixer; raises ConfigError if they do not fit it."""
        return parse(kind, self.options, f"options of mixer {self.name!r}")


def check_heads(heads: tuple[int, ...]) -> None:
    """Raise ConfigError unless `heads` are different KV heads in rising order."""
    for head in heads:
        check_size("exact_heads", head, least=0)
    if sorted(set(heads)) != list(heads):
        raise ConfigError(
            f"exact_heads must name different KV heads in rising order, got {shown(list(heads))}"
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
    by √head_width. score_factor: what they are multiplied by instead; None for that. score_cap: softmax
    scores s become cap·tanh(s / cap); 0 for none. norm_offset: norms multiply by 1 + weight.
    qk_norm_of: with qk_norm, 'head' is one RMS norm for all heads, 'whole' one over the projection of all
    heads, 'each' a LayerNorm without bias for each head.
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
    qk_norm_of: str = "head"
    norm_offset: bool = False
    positions: str = "rope"
    rope: RopeConfig = field(default_factory=RopeConfig)
    relative: RelativeConfig | None = None
    scaled_scores: bool = True
    score_factor: float | None = None
    score_cap: float = 0.0
    max_positions: int = 2048
    pad_id: int | None = None
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size width layers heads kv_heads head_width mlp_width")
        check_sizes(self, "max_positions")
        check_positive("norm_eps", self.norm_eps, zero=True)
        check_choice("qk_norm_of", self.qk_norm_of, QK_NORMS)
        check_positive("score_cap", self.score_cap, zero=True)
        if self.score_factor is not None:
            check_positive("score_factor", self.score_factor)
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
        if self.norm_offset and (self.norm != "rms" or self.qk_norm_of != "head"):
            raise ConfigError(
                "norm_offset goes with norm 'rms' and qk_norm_of 'head', got "
                f"{self.norm!r} and {self.qk_norm_of!r}"
            )
        if self.positions not in ("rope", "learned", "relative"):
            raise ConfigError(
                f"positions must be 'rope', 'learned' or 'relative', got {self.positions!r}"
            )
        if (self.positions == "relative") != (self.relative is not None):
            raise ConfigError(
                f"positions {self.positions!r} with relative={self.relative}: a relative bias goes "
                "with positions 'relative' and with no other"
            )
        if self.positions == "rope":
            self.rope.check_heads(self.head_width)

    @property
    def causal(self) -> bool:
        """True when no token sees a later one."""
        return True

    @property
    def score_scale(self) -> float:
        """Factor on q·k products ahead of a softmax."""
        if self.score_factor is not None:
            return self.score_factor
        return self.head_width**-0.5 if self.scaled_scores else 1.0

    @property
    def linear(self) -> bool:
        """True when no layer keeps a cache that grows with the context."""
        return not any(m.grows for m in self.mixers)

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
