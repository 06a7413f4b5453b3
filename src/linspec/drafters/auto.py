"""The drafters that a model has: those that were trained for it, and what needs no training."""

from __future__ import annotations

import logging
from typing import Any, Self

from linspec.decoding.tree import Budget
from linspec.drafters.base import DRAFTERS, Drafter, DrafterContext
from linspec.drafters.mixed import Mixed
from linspec.errors import LinspecError
from linspec.models.memory import weight_bytes

_log = logging.getLogger("linspec")

# what needs nothing and learns from every request
_ALWAYS = "suffix"
# drafters are compared by what they expect of trees of this size
_COMPARED = Budget.of(16)
# of the target's weights: drafts of smaller models cost a large part of a step, and did not pay where they
# were measured (docs/results/speculation.md)
_LEAST_BYTES = 500_000_000


@DRAFTERS.register(
    "auto",
    summary="suffix, and the best drafter that was trained for the model unless that is small",
    paper="Oliaro et al. 2024 (SuffixDecoding), arXiv 2411.04975",
    needs="nothing",
)
class AutoDrafter(Mixed):
    """A mix of suffix and the trained drafter that expects most, if there is one."""

    @classmethod
    def build(cls, context: DrafterContext, options: Any = None) -> Self:
        """With what lies in the directory of the model or comes with linspec for it."""
        if weight_bytes(context.target) < _LEAST_BYTES:
            _log.info(
                "drafter auto: %s alone, because drafts of a trained drafter cost too much beside a model as "
                "small as this; name it to use it, such as suffix+eagle",
                _ALWAYS,
            )
            return cls([DRAFTERS.build(_ALWAYS, context)])
        trained = _trained(context)
        best = max(trained, key=lambda name: trained[name].expected(_COMPARED), default=None)
        always = DRAFTERS.build(_ALWAYS, context)
        if best is None:
            _log.info(
                "drafter auto: %s alone, because no drafter was trained for this model", _ALWAYS
            )
            return cls([always])
        _log.info("drafter auto: %s and %s, which was trained for this model", _ALWAYS, best)
        return cls([always, trained[best]])


def _trained(context: DrafterContext) -> dict[str, Drafter]:
    """The drafters that were trained for the model, by their names."""
    found: dict[str, Drafter] = {}
    for entry in DRAFTERS:
        at_hand = getattr(entry.value, "at_hand", None)
        try:
            if at_hand is not None and at_hand(context):
                found[entry.name] = DRAFTERS.build(entry.name, context)
        except LinspecError as error:
            _log.warning("drafter auto goes on without %s: %s", entry.name, error)
    return found
