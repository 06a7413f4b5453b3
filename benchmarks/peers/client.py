"""The other end of `worker`: one process per engine, in the interpreter that has it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import benchmarks
import linspec
from linspec.errors import LinspecError

# seconds after which the machine is given back
_KEPT = 60.0
# of its messages, where an engine dies
_LINES_SAID = 5


class WorkerError(LinspecError):
    """An engine failed; the message is what it said."""


class Client:
    """Starts a worker and asks it. Its messages go to `log`."""

    def __init__(self, python: str, threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        # foreign interpreters have no linspec, and no engine may take more threads than the others
        roots = [Path(benchmarks.__file__).parents[1], Path(linspec.__file__).parents[1]]
        environment["PYTHONPATH"] = os.pathsep.join(map(str, roots))
        environment["OMP_NUM_THREADS"] = str(threads)
        self.log = log
        with log.open("a") as messages:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=environment,
            )

    def ask(self, operation: str, **arguments: Any) -> Any:
        """The result of one operation; raises WorkerError when the engine fails or dies."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"op": operation, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def _ended(self) -> WorkerError:
        """What the process said last: its log may lie in a folder that does not outlive the run."""
        said = self.log.read_text(errors="replace").strip().splitlines()[-_LINES_SAID:]
        return WorkerError("\n".join(["the process ended:", *said]))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def worker(python: str, threads: int, log: Path) -> Iterator[Client]:
    """A worker for the time of a block."""
    client = Client(python, threads, log)
    try:
        yield client
    finally:
        client.close()


def interpreter(name: str, pythons: Mapping[str, str]) -> str:
    """The Python that runs a peer; linspec itself always runs in this one."""
    return sys.executable if name.startswith("linspec") else pythons.get(name, sys.executable)


class QuietMachine:
    """While the block lasts, `guard` runs a command that waits: it may stop what else is on the machine."""

    def __init__(self, guard: str) -> None:
        self.guard = guard
        self.waiting: subprocess.Popen[str] | None = None
        self.began = 0.0

    def __enter__(self) -> Self:
        if self.guard:
            command = [*self.guard.split(), "sh", "-c", "echo ready; exec cat"]
            self.waiting = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert self.waiting.stdout is not None
            if self.waiting.stdout.readline() != "ready\n":
                self.__exit__()
                raise LinspecError(f"--guard {self.guard!r} did not run the command it was given")
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self.waiting is not None:
            # it ends when its input is closed
            self.waiting.communicate()
            self.waiting = None

    def breathe(self) -> None:
        """Between two measurements: let others go on for a moment if they waited long."""
        if self.waiting is not None and time.monotonic() - self.began > _KEPT:
            self.__exit__()
            self.__enter__()
