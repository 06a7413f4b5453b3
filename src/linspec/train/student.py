"""The student: which mixer every layer gets, and the teacher's weights in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from linspec.checkpoints.origin import share_origin
from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.specs import DEFAULT_GROUP, DEFAULT_WINDOW
from linspec.models.config import Seq2SeqConfig
from linspec.models.decoder import Decoder
from linspec.models.skeleton import without_memory
from linspec.train.objective import Predictor
from linspec.train.span_losses import SpanLosses

# attention that a pretrained model comes with
FULL_SOFTMAX = ("softmax", "window")

P = TypeVar("P", bound=Predictor)
C = TypeVar("C", bound=StackConfig | Seq2SeqConfig)


def student_mixers(
    config: StackConfig | Seq2SeqConfig, wanted: MixerConfig, keep: Iterable[int]
) -> tuple[MixerConfig, ...]:
    """`wanted` in every layer but those of `keep`, which stay as they are.

    An encoder-decoder counts the layers of its encoder first.
    """
    keep = set(keep)
    layers = range(len(config.mixers))
    strange = sorted(layer for layer in keep if layer not in layers)
    if strange:
        raise ConfigError(f"no layer {strange[0]}: layers are 0..{layers[-1]}")
    # `softmax` has no group: its size must not make two equal mixers differ
    if wanted.name == "softmax" and not wanted.taps:
        wanted = MixerConfig()
    mixers = tuple(mixer if layer in keep else wanted for layer, mixer in enumerate(config.mixers))
    if mixers != config.mixers:
        check_softmax(config)
    return mixers


def check_softmax(config: StackConfig | Seq2SeqConfig) -> None:
    """Raise ConfigError for a source whose attention has been replaced: what was searched would be lost."""
    names = dict.fromkeys(mixer.name for mixer in config.mixers)
    if not names.keys() & set(FULL_SOFTMAX):
        raise ConfigError(
            f"no layer of this source has softmax attention, its mixers are {', '.join(names)}; linearize "
            "the model that it was made from (its linearize.json names it), or keep all its layers with "
            "keep_softmax to train it on"
        )


def check_mixers(teacher: P, mixers: tuple[MixerConfig, ...]) -> P:
    """A student of `teacher` without weights; raises ConfigError if it cannot have these mixers."""
    with torch.device("meta"):
        return _make_student(teacher, mixers)


def check_taps(mixers: Iterable[MixerConfig], length: int) -> None:
    """Raise ConfigError if a convolution reaches beyond training texts of `length` tokens."""
    taps = max((mixer.taps for mixer in mixers), default=0)
    if taps > length:
        raise ConfigError(
            f"a convolution of {taps} taps is longer than the {length} tokens of a training text, so "
            "some would learn nothing; choose fewer --taps or a longer --context"
        )


def check_reach(mixers: Iterable[MixerConfig], longest: int, exact_tokens: int | None) -> None:
    """Raise ConfigError for what reaches far beyond the `longest` texts that the teacher can read.

    Nothing could be learned about it, and the largest sizes ask for more memory than there is.
    """
    if exact_tokens is not None and exact_tokens > longest:
        raise ConfigError(
            f"exact_tokens must be at most {longest}, the positions that this teacher can read, got "
            f"{exact_tokens}; lower it"
        )
    # the defaults fit every teacher, also one that reads less than a group
    most = max(longest, DEFAULT_GROUP, DEFAULT_WINDOW)
    for mixer in mixers:
        reaches = {
            "group": mixer.group,
            "span": (mixer.span - 1) * mixer.group,
            "window": mixer.window,
            "keep": mixer.keep,
        }
        for name, reach in reaches.items():
            if reach > most:
                raise ConfigError(
                    f"{name} {getattr(mixer, name)} of mixer {mixer.name!r} (group {mixer.group}) is beyond "
                    f"the {longest} positions that this teacher can read; choose a smaller {name}"
                )


def _make_student(teacher: P, mixers: tuple[MixerConfig, ...]) -> P:
    kind: Callable[..., P] = type(teacher)
    return kind(teacher.config.with_mixers(mixers))


def with_mixers(teacher: P, mixers: tuple[MixerConfig, ...]) -> P:
    """A student with the teacher's weights; what only its mixers have starts at its own init."""
    student = _make_student(teacher, mixers)
    student.load_state_dict(teacher.state_dict(), strict=False)
    share_origin(teacher, student)
    return student


def sharing(teacher: Decoder, mixers: tuple[MixerConfig, ...]) -> Decoder:
    """As `with_mixers` for mixers without weights of their own: frozen, on the teacher's very tensors."""
    with without_memory():
        student = _make_student(teacher, mixers)
    missing = sorted(student.state_dict().keys() - teacher.state_dict().keys())
    if missing:
        raise ConfigError(
            f"these mixers have weights of their own, {missing[0]} first, which the teacher has not; take "
            "mixers without, such as streaming"
        )
    student.load_state_dict(teacher.state_dict(), assign=True)
    student.tie()
    share_origin(teacher, student)
    return student.requires_grad_(False).eval()


def changed_layers(teacher: C, student: C) -> list[int]:
    """Layers whose mixers differ."""
    pairs = zip(teacher.mixers, student.mixers, strict=True)
    return [layer for layer, (old, new) in enumerate(pairs) if old != new]


def by_need(
    teacher: Predictor,
    mixers: tuple[MixerConfig, ...],
    layers: Sequence[int],
    losses: SpanLosses | None,
    *,
    exact_tokens: int | None,
    softmax_layers: int,
) -> tuple[MixerConfig, ...]:
    """`mixers` with what the teacher's `layers` need, as `losses` say; the same for all without one.

    softmax_layers: so many stay as they are. exact_tokens: see LinearizeRecipe; None leaves the spans.
    """
    group = mixers[layers[0]].group
    known = losses or SpanLosses(
        [max(1, (exact_tokens or 0) // group)], {layer: [0.0] for layer in layers}
    )
    kept = known.neediest(softmax_layers)
    found = list(mixers)
    for layer in kept:
        found[layer] = teacher.config.mixers[layer]
    rest = known.without(kept)
    if exact_tokens is not None:
        for layer, span in rest.spans_by_need(len(rest.losses) * exact_tokens // group).items():
            found[layer] = replace(found[layer], span=span)
    return tuple(found)


def spread(
    mixers: tuple[MixerConfig, ...], spans: Sequence[int], keep: Iterable[int] = ()
) -> tuple[MixerConfig, ...]:
    """`mixers` with a span for each layer; those of `keep` stay as they are."""
    if len(spans) != len(mixers):
        raise ConfigError(f"{len(spans)} spans given for {len(mixers)} layers; give one for each")
    return tuple(
        mixer if layer in keep else replace(mixer, span=span)
        for layer, (mixer, span) in enumerate(zip(mixers, spans, strict=True))
    )
