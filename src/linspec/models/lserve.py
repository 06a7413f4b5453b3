"""`--attention lserve:…`: KV heads that recall select pages, the others stream (LServe, DuoAttention).

    options = lserve_options("lserve:budget=1024,exact=22")
    model = with_lserve(load_model("smollm2"), options, heads)

Which heads recall is found once for a model, by `linspec calibrate`. The weights are those of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.mixers.exact_heads import Heads, by_head_mixers
from linspec.mixers.specs import DEFAULT_GROUP, DEFAULT_SINKS, make_mixer
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.own_forms import with_attention
from linspec.models.sparse import LSERVE, check_causal
from linspec.utils.messages import shown
from linspec.utils.options import option
from linspec.utils.registry import Registry
from linspec.utils.sizes import check_size

# attention that is arranged over the heads of a model; a mixer that can stand in for softmax needs no entry
ARRANGEMENTS: Registry[object] = Registry("attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class LserveOptions:
    """Which heads select, and what the two kinds of heads read."""

    budget: int = option(
        "tokens of earlier groups that a head which recalls reads", default=1024, short=True
    )
    exact: str = option(
        "KV heads that recall: 22, 12% or layers:0,7; of a number, linspec calibrate finds which",
        default="12%",
    )
    window: int = option("tokens that the other heads see, their own group included", default=512)
    sinks: int = option("first tokens that the other heads see", default=DEFAULT_SINKS)

    def __post_init__(self) -> None:
        check_size("budget", self.budget)
        check_size("sinks", self.sinks, least=0)
        check_size("window", self.window)
        if self.window % DEFAULT_GROUP:
            raise ConfigError(
                f"window must be a multiple of the {DEFAULT_GROUP} tokens of a group, got {self.window}"
            )

    @property
    def streaming(self) -> MixerConfig:
        """The mixer of the other heads."""
        return make_mixer("streaming", span=self.window // DEFAULT_GROUP, sinks=self.sinks)


@ARRANGEMENTS.register(
    LSERVE,
    summary="`pages` for the KV heads that recall, `streaming` for the others; linspec calibrate finds them",
    paper="Yang et al. 2025 (LServe), arXiv 2502.14866; Xiao et al. 2024 (DuoAttention), arXiv 2410.10819",
    options=LserveOptions,
)
class Lserve:
    """An arrangement of mixers; see `with_lserve`."""


def is_lserve(spec: str) -> bool:
    """Whether a spec of `--attention` names this arrangement."""
    return spec.partition(":")[0] == LSERVE


def lserve_options(spec: str) -> LserveOptions:
    """The options in a spec; raises ConfigError that names what does not fit."""
    _, options = ARRANGEMENTS.read(spec)
    assert isinstance(options, LserveOptions)
    return options


def with_lserve(model: Decoder, spec: str, heads: Heads) -> Decoder:
    """`model` whose KV heads `heads` select pages, while the others stream; the weights are shared.

    Raises ConfigError for a model that is not softmax attention over all tokens throughout.
    """
    check_causal(model, spec)
    check_plain(model.config, spec)
    options = lserve_options(spec)
    pages = f"pages:budget={options.budget}"
    mixers = by_head_mixers(model.config, options.streaming, heads, pages)
    made = with_attention(model, mixers)
    made.config = model.config.with_mixers(tuple(block.mixer.mixer for block in made.layers))
    return made


def check_plain(config: DecoderConfig, spec: str) -> None:
    """Raise ConfigError unless all layers are softmax attention over all tokens."""
    others = sorted({mixer.name for mixer in config.mixers if mixer.name != "softmax"})
    if others:
        raise ConfigError(
            f"attention={shown(repr(spec))} is for models all of whose layers are softmax, and this one has "
            f"{', '.join(others)}; of such a model, pages:budget=… serves the heads that see everything"
        )
