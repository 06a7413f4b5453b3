"""The student: which mixer every layer gets, and the teacher's weights in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from linspec.config import MixerConfig, StackConfig
from linspec.errors import ConfigError
from linspec.files import replace_text
from linspec.mixers import MIXERS
from linspec.models.decoder import Decoder
from linspec.train.data import Windows
from linspec.train.reach import Reach, measure_reach

DEFAULT_GROUP = 64
DEFAULT_ROWS = 384
DEFAULT_TAPS = 32
DEFAULT_WINDOW = 64
# the layers are measured on the tokens of so many windows ...
REACH_WINDOWS = 8
# ... in texts of so many times the training context, where the teacher has the positions
REACH_BEYOND = 4
# mixers that by default keep the teacher's softmax weights within reach ...
SOFTMAX_WITHIN = ("local", "grouped", "aug", "gla", "gdn")
# ... and all that have exact weights there
SEE_EXACTLY = (*SOFTMAX_WITHIN, "hedgehog", "linformer", "yoso")


def make_mixer(
    mixer: str | MixerConfig,
    *,
    group: int = DEFAULT_GROUP,
    span: int | None = None,
    kernel: str | None = None,
    taps: int | None = None,
    window: int | None = None,
) -> MixerConfig:
    """The configuration of a mixer by name; raises ConfigError for an unknown one.

    Mixers that see a few groups exactly keep the teacher's softmax weights there, over two groups:
    with one, a token at the start of a group would see nothing of its past exactly.
    """
    if isinstance(mixer, MixerConfig):
        MIXERS.entry(mixer.name)
        return mixer
    MIXERS.entry(mixer)
    if taps is None:
        taps = DEFAULT_TAPS if mixer == "aug" else 0
    if window is None:
        window = DEFAULT_WINDOW if mixer == "window" else 0
    return MixerConfig(
        name=mixer,
        group=group,
        span=span if span is not None else 2 if mixer in SEE_EXACTLY else 1,
        kernel=kernel if kernel is not None else "softmax" if mixer in SOFTMAX_WITHIN else "own",
        taps=taps,
        window=window,
    )


def student_mixers(
    config: StackConfig, wanted: MixerConfig, keep: Iterable[int]
) -> tuple[MixerConfig, ...]:
    """`wanted` in every layer but those of `keep`, which stay as they are."""
    keep = set(keep)
    strange = sorted(layer for layer in keep if not 0 <= layer < config.layers)
    if strange:
        raise ConfigError(f"no layer {strange[0]}: layers are 0..{config.layers - 1}")
    # `softmax` has no group: its size must not make two equal mixers differ
    if wanted.name == "softmax" and not wanted.taps:
        wanted = MixerConfig()
    return tuple(mixer if layer in keep else wanted for layer, mixer in enumerate(config.mixers))


def with_mixers(teacher: Decoder, mixers: tuple[MixerConfig, ...]) -> Decoder:
    """A student with the teacher's weights; what only its mixers have starts at its own init."""
    student = Decoder(teacher.config.with_mixers(mixers))
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def changed_layers(teacher: StackConfig, student: StackConfig) -> list[int]:
    """Layers whose mixers differ."""
    pairs = zip(teacher.mixers, student.mixers, strict=True)
    return [layer for layer, (old, new) in enumerate(pairs) if old != new]


def by_need(
    teacher: Decoder,
    mixers: tuple[MixerConfig, ...],
    layers: Sequence[int],
    windows: Windows,
    folder: Path,
    *,
    rows: int | None,
    softmax_layers: int,
) -> tuple[MixerConfig, ...]:
    """`mixers` with what the teacher's `layers` need; measured once for a run that is resumed.

    Texts to measure on are longer than the windows of training where the teacher can read them: what
    a layer needs from far above shows nowhere else. softmax_layers: so many stay as they are. rows:
    see `linearize`; None leaves the spans.
    """
    file = folder / "reach.json"
    if not file.exists():
        context = min(REACH_BEYOND * windows.context, teacher.config.max_positions)
        count = REACH_WINDOWS * windows.context // context
        batch = windows.batch(0, count, context).to(teacher.embed.weight.device)
        measured = measure_reach(teacher, mixers[layers[0]], layers, batch)
        replace_text(file, json.dumps([measured.spans, list(measured.losses.values())]))
    spans, losses = json.loads(file.read_text(encoding="utf-8"))
    reach = Reach(spans, dict(zip(layers, losses, strict=True)))
    kept = reach.neediest(softmax_layers)
    found = list(mixers)
    for layer in kept:
        found[layer] = teacher.config.mixers[layer]
    rest = reach.without(kept)
    if rows is not None:
        groups = len(rest.losses) * rows // mixers[layers[0]].group
        for layer, span in rest.spans_by_need(groups).items():
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
