"""How soon a model starts to generate, and in how much memory: fresh processes, timed from outside.

    report = bench_load("small")
    print(report.warm_seconds, report.memory_over_file)

*Warm*: the model's files are in the page cache. *Cold*: the system is asked to forget them first; it
keeps what another process has mapped. Runs take turns with a process that only imports torch, which
is the part that no loading can be faster than.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from linspec.checkpoints.hub import resolve
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.errors import CheckpointError, ConfigError

_PROMPT_TOKENS = 16
_POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Load:
    """Medians over fresh processes.

    seconds: from the start of the process to the first output. cpu_seconds: of all threads, until its
    end; a busy machine moves them less. peak_megabytes: resident, mapped pages of the file included;
    with `torch_`, of a process that imports torch and ends. memory_over_file: the peak over the size
    of the weights on disk; beside the weights it holds Python, torch and the state of a short text.
    """

    file_megabytes: float
    warm_seconds: float
    warm_cpu_seconds: float
    cold_seconds: float
    torch_seconds: float
    torch_cpu_seconds: float
    peak_megabytes: float
    torch_megabytes: float
    memory_over_file: float
    repeats: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(slots=True)
class _Runs:
    """What the processes of one kind took."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)


def bench_load(
    model: str | Path, *, tokens: int = 4, repeats: int = 5, threads: int | None = None
) -> Load:
    """Start `linspec generate` on a model, cold and warm, `repeats` times each.

    Raises ConfigError for counts below 1, CheckpointError when a process fails.
    """
    if tokens < 1 or repeats < 1:
        raise ConfigError(f"tokens and repeats must be 1 or more, got {tokens} and {repeats}")
    folder = resolve(model)
    files = [folder] if folder.is_file() else sorted(filter(Path.is_file, folder.iterdir()))
    weights = [path for path in files if path == folder or path.suffix == ".safetensors"]
    size = sum(path.stat().st_size for path in weights) / 1e6
    text = load_text_tokenizer(folder).decode(range(10, 10 + _PROMPT_TOKENS))
    command = [*(sys.executable, "-m", "linspec", "generate", str(folder), "--prompt", text)]
    command += ["--max-tokens", str(tokens), "--ignore-eos"]
    command += [] if threads is None else ["--threads", str(threads)]
    only_torch = [sys.executable, "-c", "import torch; print(torch.__version__)"]
    cold, warm, torch = _Runs(), _Runs(), _Runs()
    for _ in range(repeats):
        _forget(files)
        _measure(command, cold)
        _measure(command, warm)
        _measure(only_torch, torch)
    peak = statistics.median(warm.megabytes)
    return Load(
        file_megabytes=round(size, 1),
        warm_seconds=_median(warm.seconds),
        warm_cpu_seconds=_median(warm.cpu),
        cold_seconds=_median(cold.seconds),
        torch_seconds=_median(torch.seconds),
        torch_cpu_seconds=_median(torch.cpu),
        peak_megabytes=round(peak, 1),
        torch_megabytes=round(statistics.median(torch.megabytes), 1),
        memory_over_file=round(peak / size, 3),
        repeats=repeats,
    )


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def _forget(files: Sequence[Path]) -> None:
    """Ask the system to drop the files from its page cache, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(command: Sequence[str], runs: _Runs) -> None:
    """Run a process to its end; the clock stops at its first output."""
    before, began = os.times(), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        first, peak = None, 0.0
        while True:
            ready, _, _ = select.select([process.stdout], [], [], _POLL_SECONDS)
            peak = max(peak, _peak_megabytes(process.pid))
            if not ready:
                continue
            # unbuffered: what was printed is there at once, nothing is the end
            if not os.read(process.stdout.fileno(), 65536):
                break
            first = first or time.perf_counter() - began
        errors = process.stderr.read().decode(errors="replace").strip()
    after = os.times()
    if process.returncode or first is None:
        raise CheckpointError(f"a process that loads the model failed: {errors or 'no output'}")
    runs.seconds.append(first)
    runs.cpu.append(
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    runs.megabytes.append(peak)


def _peak_megabytes(pid: int) -> float:
    """Most memory that was resident so far; 0 where the system does not say."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except (OSError, ValueError, IndexError):
        pass
    return 0.0
