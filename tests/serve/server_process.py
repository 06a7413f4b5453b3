"""`linspec serve` as a process, for what ends or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class Served:
    """`linspec serve` in a process of its own.

    inside: words of a command that runs the rest of its line.
    """

    def __init__(self, *args: object, cache: Path, inside: Sequence[str] = ()) -> None:
        command = [*inside, sys.executable, "-m", "linspec", "serve", *map(str, args)]
        command += ["--port", "0"]
        env = {**os.environ, "LINSPEC_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
        # tests may run behind nohup, which children would inherit: such a server goes on at a hangup
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        signal.signal(signal.SIGHUP, before)
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("serving "):
                break
        else:
            raise AssertionError("".join(self.lines))
        self.address = line.split(" at ")[1].split("/v1")[0]

    def end(self) -> str:
        """What it printed, once it has ended."""
        _, rest = self.process.communicate(timeout=60)
        return "".join(self.lines) + rest
