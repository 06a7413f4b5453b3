"""All combinations of the policies of masked diffusion that are worth a measurement.

    [spec_of(plan) for plan in lattice(("fixed:32", "fixed:8"), depth=2)]

Policies come from their registries. The table below has the settings that are compared; a policy that is not
in it joins with its own defaults. A combination changes at most `depth` kinds of the reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from linspec.diffusion.kinds import kinds
from linspec.engine.loops.masked_diffusion import DiffusionOptions
from linspec.errors import ConfigError

# kind, policy: the specs that stand for it
SETTINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("commit", "threshold"): ("threshold:0.9", "threshold:0.7"),
    ("commit", "factor"): ("factor:1.0", "factor:0.5"),
    ("stop", "prophet"): ("prophet:over=least",),
    ("cache", "prefix"): ("prefix", "prefix:4"),
    ("cache", "dual"): ("dual", "dual:4"),
}
# what a combination begins from
FIRST = {"commit": "static", "stop": "end-of-text", "cache": "none", "verify": "none"}
# what says something only together: the policy on the left with these of another kind
ONLY_WITH: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    # the published sampler; behind the end of a text it computes what nobody sees
    ("stop", "never", "commit", ("static",)),
    ("stop", "never", "cache", ("none",)),
    ("stop", "never", "verify", ("none",)),
    # a window is no block of a cache, and drafts are of whole blocks
    ("block", "sliding", "cache", ("none", "elastic")),
    ("block", "sliding", "verify", ("none",)),
    ("cache", "elastic", "verify", ("none",)),
)


def name_of(spec: str) -> str:
    """The policy of a spec."""
    return spec.partition(":")[0]


def specs(kind: str, blocks: Sequence[str]) -> list[str]:
    """What is compared of a kind, the reference first, without what cannot be made from a name."""
    given = list(blocks) if kind == "block" else [FIRST.get(kind, "none")]
    mine = {name_of(spec) for spec in given}
    names = [name for name in kinds()[kind].names() if name not in mine]
    found = [*given, *(spec for name in names for spec in SETTINGS.get((kind, name), (name,)))]
    return [spec for spec in found if why_not(kind, spec) is None]


def why_not(kind: str, spec: str) -> str | None:
    """Why a spec cannot stand by itself, such as for a file that it needs; None if it can."""
    try:
        kinds()[kind].read(spec)
    except ConfigError as error:
        return str(error)
    return None


def left_out() -> Iterator[str]:
    """A line for each policy that needs more than its name; `--also` takes a spec with what it needs."""
    for kind, registry in kinds().items():
        for name in registry.names():
            if (kind, name) not in SETTINGS and (why := why_not(kind, name)):
                yield f"{kind}={name} is left out: {why}"


def sensible(chosen: Mapping[str, str]) -> bool:
    """Whether a combination can say something that a smaller one does not."""
    return not any(
        name_of(chosen[kind]) == policy and name_of(chosen.get(other, names[0])) not in names
        for kind, policy, other, names in ONLY_WITH
    )


def lattice(
    blocks: Sequence[str], depth: int, also: Sequence[str] = ()
) -> Iterator[DiffusionOptions]:
    """The reference, then everything that differs from it in 1 to `depth` kinds.

    blocks: specs of blocks, that of the reference first. also: further specs, such as 'cache=dual:2'.
    """
    ways = {kind: specs(kind, blocks) for kind in kinds() if _known(kind)}
    for each in also:
        kind, _, spec = each.partition("=")
        if kind not in ways:
            raise ConfigError(f"{each!r} names no kind of policy; known: {', '.join(ways)}")
        kinds()[kind].read(spec)
        ways[kind].append(spec)
    found = [dict(zip(ways, chosen, strict=True)) for chosen in itertools.product(*ways.values())]
    first = found[0]
    changed = [sum(each[kind] != first[kind] for kind in ways) for each in found]
    for wanted in range(depth + 1):
        for plan, count in zip(found, changed, strict=True):
            if count == wanted and sensible(plan):
                options: dict[str, Any] = plan
                yield DiffusionOptions(**options)


def _known(kind: str) -> bool:
    """Whether the loop asks for this kind."""
    return kind in DiffusionOptions.__dataclass_fields__
