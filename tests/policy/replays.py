"""Requests that come as they like: the latency of a policy in the virtual machine room, by load.

python tests/policy/replays.py    # mean latency by load, of auto, of no drafts and of every fixed size
"""

from __future__ import annotations

import random
from dataclasses import replace

from world import SIZES, Cell, Room

from linspec.policies.base import Policy
from linspec.policies.fixed import Fixed
from linspec.policies.goodput import Goodput

# requests that run at once; others wait
SLOTS = 16
# of what plain decoding of all slots answers
LOADS = (0.1, 0.4, 0.7, 0.95)


def arrivals(cell: Cell, load: float, seed: int) -> list[float]:
    """When each request of a cell comes, at a share of the plain capacity of the machine."""
    rng = random.Random(seed)
    per_second = load * replace(cell, batch=SLOTS).plain() / cell.answer
    now, found = 0.0, []
    for _ in range(cell.requests):
        now += rng.expovariate(per_second)
        found.append(now)
    return found


def replay(
    cell: Cell, policy: Policy, load: float, seed: int = 0, *, free: bool = False
) -> tuple[float, Room]:
    """Mean seconds from a request's arrival to its end, and the room with what was found."""
    room, come = Room(cell, policy, seed, free=free), arrivals(cell, load, seed)
    began, waited, now, begun = dict[int, float](), list[float](), 0.0, 0
    while len(waited) < len(come):
        if not room.running:
            now = max(now, come[begun])
        free_slots = sorted({*range(SLOTS)} - {row.slot for row in room.running})
        for slot in free_slots:
            if begun < len(come) and come[begun] <= now:
                room.begin(seed * 100_003 + begun, slot)
                began[slot] = come[begun]
                begun += 1
        before = room.found.seconds
        finished = room.round()
        now += room.found.seconds - before
        waited += [now - began[row.slot] for row in finished]
    return sum(waited) / len(waited), room


def best_fixed(cell: Cell, load: float, seed: int = 0) -> tuple[float, int]:
    """The least mean latency of a size for every round, no drafts among them, and the size."""
    return min((replay(cell, Fixed(n), load, seed, free=True)[0], n) for n in (0, *SIZES))


if __name__ == "__main__":
    for drafter, text in (("model", "code"), ("heads", "code"), ("lookup", "repetitive")):
        for machine in ("135m-int8", "1b-int8", "linear"):
            each = Cell(machine, drafter, text, requests=300)
            for share in LOADS:
                auto = replay(each, Goodput(each.known()), share)[0]
                fixed, size = best_fixed(each, share)
                plain = replay(each, Fixed(0), share, free=True)[0]
                print(
                    f"{each.name} load {share}: {auto / fixed:.3f} of fixed:{size}, "
                    f"{auto / plain:.3f} of plain",
                    flush=True,
                )
