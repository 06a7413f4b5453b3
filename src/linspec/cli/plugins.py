"""All registries at one place: what `linspec list` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linspec.diffusion import BLOCKS, CACHES, COMMITS, STOPS, VERIFIES
from linspec.drafters import DRAFTERS
from linspec.engine.loops import LOOPS
from linspec.mixers import MIXERS, Mixer
from linspec.models.lserve import ARRANGEMENTS
from linspec.models.rope_scaling import ROPE_SCALINGS
from linspec.policies import POLICIES
from linspec.state.registry import STATES
from linspec.train.drafters import TRAININGS
from linspec.utils.registry import Entry, Registry
from linspec.verifiers import VERIFIERS


def catalogue(us: Mapping[str, float] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Name, summary, paper, options and further facts of every plug-in, by axis.

    Of mixers: `state` (floats per layer), `direction` and `cost` (multiply-adds per query head). d is
    the head width, G the group, n the span, T the context, W the taps, m the random features, p and M
    the rows and groups of linformer. us: microseconds of a token and layer of each, where they were
    measured (`bench/mixers.py`).
    """
    axes: dict[str, Registry[Any]] = {
        "mixers": MIXERS,
        "attention": ARRANGEMENTS,
        "rope scalings": ROPE_SCALINGS,
        "drafters": DRAFTERS,
        "verifiers": VERIFIERS,
        "policies": POLICIES,
        "caches": STATES,
        "loops": LOOPS,
        "diffusion blocks": BLOCKS,
        "diffusion commits": COMMITS,
        "diffusion stops": STOPS,
        "diffusion caches": CACHES,
        "diffusion verifies": VERIFIES,
        "trainings": TRAININGS,
    }
    found = {axis: [_facts(entry) for entry in registry] for axis, registry in axes.items()}
    for mixer in found["mixers"]:
        mixer["direction"] = _direction(MIXERS[mixer["name"]])
        if us:
            mixer["us"] = us.get(mixer["name"])
    return found


def _facts(entry: Entry[Any]) -> dict[str, Any]:
    return {
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.paper,
        **entry.facts,
        "options": [setting.to_json() for setting in entry.settings],
    }


def _direction(mixer: type[Mixer]) -> str:
    if not mixer.causal:
        return "bidirectional"
    return "causal, bidirectional" if mixer.bidirectional() else "causal"
