"""What layers hand to later layers while one call of a model runs: such as the positions that they selected.

    with handing({}):                    # around all layers, or around a layer with what earlier ones left
        hand_on("key", found)            # in one layer
        handed("key", "tidal")           # in a later one

Nothing outlives the call or is seen by another thread: a thread sees what it opened itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from linspec.errors import StateError

_NOW: ContextVar[dict[Hashable, Any] | None] = ContextVar("handed", default=None)


@contextmanager
def handing(things: dict[Hashable, Any]) -> Iterator[None]:
    """Layers computed inside hand things on in `things`."""
    before = _NOW.set(things)
    try:
        yield
    finally:
        _NOW.reset(before)


def hand_on(key: Hashable, thing: Any) -> None:
    """Hand `thing` to later layers, in the place of an earlier one; a layer alone has none."""
    things = _NOW.get()
    if things is not None:
        things[key] = thing


def handed(key: Hashable, mixer: str) -> Any:
    """What an earlier layer handed on last; raises StateError where none did in this call."""
    things = _NOW.get()
    if things is None or key not in things:
        raise StateError(
            f"a layer with mixer {mixer!r} reads what an earlier layer selects, and none did in this call; "
            "run the layer that selects too, or let this one select (selects=true)"
        )
    return things[key]
