"""What is wrong with the switches in the environment: `linspec info` names them all and says the rest.

told = Told()
told.by(load, None)       # the kernels; None where LINSPEC_CPU_KERNELS is wrong, which `told.errors` says
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from linspec.bench.machine import set_threads
from linspec.errors import ConfigError
from linspec.kernels.cpu.library import load
from linspec.kernels.gpu.graphs import SWITCH as GRAPHS
from linspec.kernels.gpu.graphs import SWITCHES as GRAPHS_WORDS
from linspec.kernels.gpu.switches import switch
from linspec.kernels.gpu.triton.available import SWITCH as TRITON
from linspec.kernels.gpu.triton.available import SWITCHES as TRITON_WORDS
from linspec.models.judged_rounds import SWITCH as ROUNDS
from linspec.models.judged_rounds import SWITCHES as ROUNDS_WORDS
from linspec.utils.messages import shown

T = TypeVar("T")

THREADS = "LINSPEC_THREADS"
# very long numbers Python itself refuses to read
_DIGITS = 18
# of a device, by the name of their fact
DEVICE_SWITCHES = {
    "triton": (TRITON, TRITON_WORDS),
    "cuda_graphs": (GRAPHS, GRAPHS_WORDS),
    "rounds_ahead": (ROUNDS, ROUNDS_WORDS),
}


class Told:
    """Facts that a wrong setting may keep back, and what is wrong with it."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def by(self, make: Callable[[], T], instead: T) -> T:
        """What `make` returns; `instead` where it raises ConfigError, which is noted."""
        try:
            return make()
        except ConfigError as error:
            if str(error) not in self.errors:
                self.errors.append(str(error))
            return instead

    def switches(self, threads: int | None) -> None:
        """Use so many threads, or those of the environment; note every switch whose word is wrong."""
        self.by(lambda: use_threads(threads), None)
        self.by(load, None)
        for name, words in DEVICE_SWITCHES.values():
            self.by(partial(switch, name, words), "")


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads; None takes LINSPEC_THREADS, and all where that is not set.

    Raises ConfigError for what is no such number.
    """
    given = os.environ.get(THREADS)
    if threads is not None or not given:
        return set_threads(threads)
    if not given.isascii() or not given.isdecimal() or len(given) > _DIGITS:
        raise ConfigError(
            f"{THREADS} must be a whole number from 1 on, got {shown(repr(given))}; leave it out for all "
            "cores"
        )
    return set_threads(int(given), THREADS)
