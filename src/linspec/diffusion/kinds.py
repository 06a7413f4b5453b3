"""All kinds of policies by the names that a loop spec has for them, and which policies change nothing."""

from __future__ import annotations

from typing import Any

from linspec.diffusion import base
from linspec.utils.registry import Registry

# a fact of a policy whose output, with the other policies as they are, is that of the first one of its kind
LOSSLESS = "lossless"


def kinds() -> dict[str, Registry[Any]]:
    """The registry of each kind, such as that of `commit`."""
    found = (each for each in vars(base).values() if isinstance(each, Registry))
    return {each.axis.split()[1]: each for each in found}


def lossless(kind: str) -> list[str]:
    """The policies of a kind that only change what an output costs."""
    return [entry.name for entry in kinds()[kind] if entry.facts.get(LOSSLESS) == "yes"]
