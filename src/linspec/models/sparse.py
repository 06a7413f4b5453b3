"""A decoder whose softmax layers read a part of the past, or a rough form of it: what `--attention` names.

    model = with_sparse_attention(load_model("smollm2"), "pages:budget=1024")

Its weights are those of the model, and it is another model all the same: its configuration says so.
"""

from __future__ import annotations

from dataclasses import replace

from linspec.errors import ConfigError
from linspec.mixers.base import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer
from linspec.models.block import Block
from linspec.models.decoder import Decoder
from linspec.models.own_forms import with_attention
from linspec.utils.messages import did_you_mean, shown

# an arrangement of several mixers, in `lserve.py`
LSERVE = "lserve"


def with_sparse_attention(model: Decoder, spec: str) -> Decoder:
    """`model` with the mixer of this spec for all heads that see all tokens; the layers' weights are shared.

    Raises ConfigError for a spec that names no sparse attention, and for a model that it does not fit.
    """
    check_causal(model, spec)
    made = with_attention(model, sparse_mixer(spec))
    made.config = model.config.with_mixers(
        tuple(
            _instead(own, block, spec)
            for own, block in zip(model.config.mixers, made.layers, strict=True)
        )
    )
    return made


def check_causal(model: Decoder, spec: str) -> None:
    """Raise ConfigError for a model whose tokens also see later ones."""
    if not model.config.causal:
        raise ConfigError(
            f"attention={shown(repr(spec))} is for decoders whose tokens see those before them; leave it out"
        )


def sparse_mixer(spec: str) -> MixerConfig:
    """The mixer that `--attention` names; raises ConfigError for an unknown one, or one with weights."""
    name = spec.partition(":")[0]
    names = [each for each in MIXERS.names() if MIXERS[each].stands_in]
    known = sorted((*names, LSERVE))
    if name not in names:
        raise ConfigError(
            f"attention is one of {', '.join(known)}, with options, got {shown(repr(spec))}; other mixers "
            f"have to be trained (linspec linearize){did_you_mean(name, known)}"
        )
    return make_mixer(spec)


def _instead(own: MixerConfig, block: Block, spec: str) -> MixerConfig:
    """The settings of a layer that had those of `own`."""
    if own.name == "softmax":
        return block.mixer.mixer
    if own.exact_heads and not own.options.get("exact"):
        return replace(own, options={**own.options, "exact": spec})
    return own
