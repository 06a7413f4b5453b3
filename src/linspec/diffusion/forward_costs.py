"""What forwards of masked diffusion cost by the positions that they compute, learned as they run."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Collection
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

    def observe(self, positions: int, seconds: float) -> None:
        """A forward has computed so many positions."""
        self._seen[_size(positions)].append((positions, seconds))

    def __call__(self, positions: int) -> float | None:
        """Seconds of a forward of so many positions; None before there was any to tell it by.

        A size that was not seen lies on a line through the nearest ones below and above it, or through the
        nearest and the farthest one.
        """
        seen = self._seen.get(_size(positions), ())
        if len(seen) >= _ENOUGH:
            return _quick(seen)[1]
        points = [_quick(each) for each in self._seen.values() if len(each) >= _ENOUGH]
        if len(points) < 2:
            return None
        points.sort(key=lambda point: abs(point[0] - positions))
        near, far = points[0], points[-1]
        for point in points[1:]:
            if (point[0] > positions) != (near[0] > positions):
                far = point
                break
        slope = (far[1] - near[1]) / (far[0] - near[0])
        return max(near[1] + slope * (positions - near[0]), 1e-9)


def _quick(seen: Collection[tuple[int, float]]) -> tuple[int, float]:
    """Positions and seconds of one of them."""
    return sorted(seen, key=itemgetter(1))[len(seen) // 4]


def _size(positions: int) -> int:
    return round(math.log(positions, _NEAR))
