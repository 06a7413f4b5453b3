"""All registries at one place: what `linspec list` prints."""

from __future__ import annotations

from typing import Any

from linspec.drafters import DRAFTERS
from linspec.mixers import MIXERS, Mixer
from linspec.policy import POLICIES
from linspec.registry import Registry
from linspec.verify import VERIFIERS


def catalogue() -> dict[str, list[dict[str, str]]]:
    """Name, summary, paper and further facts of every plug-in, by axis.

    Of mixers: `state` (floats per layer), `direction` and `cost` (multiply-adds per query head). d is
    the head width, G the group, n the span, T the context, W the taps, m the random features, p and M
    the rows and groups of linformer.
    """
    axes: dict[str, Registry[Any]] = {
        "mixers": MIXERS,
        "drafters": DRAFTERS,
        "verifiers": VERIFIERS,
        "policies": POLICIES,
    }
    found = {
        axis: [
            {"name": entry.name, "summary": entry.summary, "paper": entry.paper, **entry.facts}
            for entry in registry
        ]
        for axis, registry in axes.items()
    }
    for mixer in found["mixers"]:
        mixer["direction"] = _direction(MIXERS[mixer["name"]])
    return found


def _direction(mixer: type[Mixer]) -> str:
    if not mixer.causal:
        return "bidirectional"
    return "causal, bidirectional" if mixer.bidirectional() else "causal"
