"""Two thread pools on the same cores, torch's and that of linspec's own kernels, and what a fork leaves.

torch's OpenMP threads spin after every parallel operator for longer than a step of a small model
takes, on the cores that the next native call needs. Between native calls, torch's operators are small:
there they run on the calling thread and wake no other.

A forked child has the thread that forked and no other. linspec's pool starts over there; torch's
does not, and an operator that needs it waits for ever. So torch computes on one thread in a child,
and native calls on as many as in the parent.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from linspec.errors import ConfigError
from linspec.utils.cores import usable_threads


@dataclass(slots=True)
class _Shared:
    """What the threads of this process agree on.

    inside: those in `torch_on_one_thread`, once for each time. native: threads of a native call, None
    for as many as torch was told to use. survivor: in a forked child, the thread that was left.
    """

    inside: list[int] = field(default_factory=list)
    native: int | None = None
    survivor: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_shared = _Shared()


def native_threads() -> int:
    """Threads of a native call: as many as torch was told to use, in this process or before a fork."""
    native = _shared.native
    return torch.get_num_threads() if native is None else native


@functools.cache
def limit_to_quota() -> None:
    """Let torch, and so native calls, use no more threads than the quota of this process lets run; once.

    Threads above the quota are stopped all together, in the middle of what the others wait for. What is
    set afterwards counts, and so does OMP_NUM_THREADS.
    """
    most = usable_threads()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > most:
        torch.set_num_threads(most)


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread and native calls on as many as before."""
    shared = _shared
    kept = _enter(shared)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        # a fork in between has left another `_shared`, whose torch stays on one thread
        if shared is _shared:
            torch.set_num_threads(kept)
            _leave(shared)


def _enter(shared: _Shared) -> int:
    """Note that this thread is inside; returns what torch has to be set to afterwards."""
    me = threading.get_ident()
    with shared.lock:
        kept = torch.get_num_threads()
        if shared.survivor is None and not shared.inside:
            shared.native = kept
        elif shared.survivor is None and me not in shared.inside:
            # what torch says now, another thread that is inside has told it
            kept = native_threads()
        shared.inside.append(me)
    return kept


def _leave(shared: _Shared) -> None:
    with shared.lock:
        shared.inside.remove(threading.get_ident())
        if shared.survivor is None and not shared.inside:
            shared.native = None


def check_fork() -> None:
    """Raises ConfigError in a forked child whose torch was told to use threads that are gone."""
    if _shared.survivor is not None and torch.get_num_threads() > 1:
        raise ConfigError(
            f"torch was told to use {torch.get_num_threads()} threads in a forked process, where it would "
            "wait for threads of its parent for ever; call torch.set_num_threads(1), which leaves "
            "linspec's own kernels all theirs, or start the process by spawn or forkserver"
        )


def outlived_fork(process: int, thread: int) -> bool:
    """Whether `thread` of `process` is in this process too: nothing was forked, or that one forked."""
    return process == os.getpid() or thread == _shared.survivor


def _after_fork() -> None:
    global _shared
    # the lock may have been held by a thread that is gone
    _shared = _Shared(native=native_threads(), survivor=threading.get_ident())
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
