"""When requests come: at random, as from people who know nothing of each other, or when one has ended.

arrivals = poisson(rate=2.0, count=100, seed=0)     # seconds from the begin
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from linspec.errors import ConfigError
from linspec.utils.sizes import check_positive, check_size


@dataclass(frozen=True, slots=True)
class Workload:
    """How a server is loaded.

    Attributes:
        requests: how many are sent.
        rate: of them in a second, in an open loop: they come whether or not others were answered.
        clients: in a closed loop instead: each sends its next request when it has its answer.
        seconds: after which these send no more, whether or not all requests were sent; None for no end.
        seed: of the arrivals.
    """

    requests: int = 64
    rate: float | None = None
    clients: int | None = None
    seed: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_size("requests", self.requests)
        if (self.rate is None) == (self.clients is None):
            raise ConfigError(
                "a workload has either a rate (requests in a second, an open loop) or a number of clients "
                f"(a closed loop), got rate={self.rate} and clients={self.clients}; give one"
            )
        if self.rate is not None:
            check_positive("rate", self.rate)
        if self.clients is not None:
            check_size("clients", self.clients)
        if self.seconds is not None:
            check_positive("seconds", self.seconds)
            if self.clients is None:
                raise ConfigError(
                    f"seconds={self.seconds} end a closed loop, and an open one takes requests / rate "
                    "seconds; give these, or a number of clients"
                )


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests come, `rate` in a second in the mean."""
    rng, now, found = random.Random(f"arrivals {seed}"), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        found.append(now)
    return found
