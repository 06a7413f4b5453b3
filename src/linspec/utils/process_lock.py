"""A lock that threads share within one process, and that a forked one has anew."""

from __future__ import annotations

import os
from threading import Lock


class ProcessLock:
    """`with lock:`, one thread at a time; a thread that a fork has left behind may have held it."""

    def __init__(self) -> None:
        self._lock, self._process = Lock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self._lock, self._process = Lock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()
