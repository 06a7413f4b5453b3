"""What forwards of masked diffusion cost by the positions that they compute, learned as they run."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from functools import partial
from operator import itemgetter

# sizes that are this near count as one: blocks have a row more at times, for the logits of their first mask
_NEAR = 1.3
# forwards that are remembered of a size, and how many are needed
_KEPT, _ENOUGH = 15, 3


class ForwardCosts:
    """Seconds by positions: of the last forwards of about that size, else by a straight line.

    The quicker quarter counts. The first forwards of a size make room, and other work makes some wait: that
    lengthens none for good.
    """

    def __init__(self) -> None:
        self._seen: defaultdict[int, deque[tuple[int, float]]] = defaultdict(
            partial(deque, maxlen=_KEPT)
        )
        # positions and seconds of the sizes that were seen often enough
        self._known: dict[int, tuple[float, float]] = {}

    def observe(self, positions: int, seconds: float) -> None:
        """A forward has computed so many positions."""
        size = _size(positions)
        seen = self._seen[size]
        seen.append((positions, seconds))
        if len(seen) >= _ENOUGH:
            self._known[size] = sorted(seen, key=itemgetter(1))[len(seen) // 4]

    def __call__(self, positions: int) -> float | None:
        """Seconds of a forward of so many positions; None before there was any to tell it by.

        A size that was not seen lies on a line through the nearest ones below and above it, or through the
        nearest and the farthest one.
        """
        known = self._known.get(_size(positions))
        if known is not None:
            return known[1]
        if len(self._known) < 2:
            return None
        points = sorted(self._known.values(), key=lambda point: abs(point[0] - positions))
        near, far = points[0], points[-1]
        for point in points[1:]:
            if (point[0] > positions) != (near[0] > positions):
                far = point
                break
        slope = (far[1] - near[1]) / (far[0] - near[0])
        return max(near[1] + slope * (positions - near[0]), 1e-9)


def _size(positions: int) -> int:
    return round(math.log(positions, _NEAR))
