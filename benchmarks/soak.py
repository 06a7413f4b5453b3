"""Whether a server of linspec stands a long load: memory flat, no failed request, latencies as at the start.

    python -m benchmarks.soak smollm2 --prompts spec_bench.jsonl --minutes 10

First its capacity is measured by clients that each wait for their answer, then requests come at random
moments at a share of that. A line of JSON tells each part; the last one has the resident memory behind the
first third, in which caches fill: its median, and how far it went from that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import Contender, running
from linspec.bench.arrivals import Workload
from linspec.bench.prompts import Question, read_questions
from linspec.bench.serving import bench_serving

_EVERY = 2.0
# of a run, in which caches fill
_WARM = 1 / 3


class Watch:
    """The resident memory of a process, every few seconds, while the context lasts."""

    def __init__(self, pid: int) -> None:
        self.file = Path(f"/proc/{pid}/status")
        self.found: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            self.found.append(resident(self.file.read_text(encoding="ascii")))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def resident(status: str) -> int:
    """Bytes, from what the system says of a process."""
    (line,) = [each for each in status.splitlines() if each.startswith("VmRSS:")]
    return 1024 * int(line.split()[1])


def memory(found: Sequence[int]) -> dict[str, float]:
    """The median behind the first third in MiB, and the largest distance from it, as a share of it."""
    settled = found[int(_WARM * len(found)) :]
    usual = statistics.median(settled)
    return {
        "first_mib": found[0] / 2**20,
        "median_mib": usual / 2**20,
        "last_mib": found[-1] / 2**20,
        "spread": max(abs(each - usual) for each in settled) / usual,
    }


def soak(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The capacity, then the figures of the load."""
    questions = read_questions(given.prompts, given.per_family)
    command = [sys.executable, "-m", "linspec", "serve", f"model={given.model}"]
    command += ["--max-batch", str(given.clients), "--max-model-len", str(given.context)]
    command += ["--prefix-mib", str(given.prefix_mib)]
    with running(Contender("linspec", command), given.log) as (address, pid):
        rate = given.rate
        if rate is None:
            found = _ask(address, questions, given, _capacity(given))
            yield {"part": "capacity", **found}
            rate = given.share * found["requests_per_s"]
        count = max(1, round(60 * given.minutes * rate))
        began = time.perf_counter()
        with Watch(pid) as watch:
            found = _ask(address, questions, given, Workload(requests=count, rate=rate))
        took = time.perf_counter() - began
        yield {"part": "soak", "rate": rate, "took_s": took, **found, **memory(watch.found)}


def _capacity(given: argparse.Namespace) -> Workload:
    return Workload(requests=10**5, clients=given.clients, seconds=given.warm_seconds)


def _ask(
    address: str, questions: Sequence[Question], given: argparse.Namespace, load: Workload
) -> dict[str, Any]:
    return bench_serving(address, questions, load, max_tokens=given.tokens).to_json()


def main(words: Sequence[str] | None = None) -> None:
    """Print a line of JSON for each part."""
    about = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    about.add_argument("model")
    about.add_argument("--prompts", type=Path, required=True, help="JSON lines, as Spec-Bench's")
    about.add_argument("--per-family", type=int, default=40)
    about.add_argument("--minutes", type=float, default=10.0)
    about.add_argument("--share", type=float, default=0.8, help="of the measured capacity")
    about.add_argument("--rate", type=float, help="requests in a second, instead of a share")
    about.add_argument("--clients", type=int, default=16, help="for the capacity; also slots")
    about.add_argument("--warm-seconds", type=float, default=60.0, help="for the capacity")
    about.add_argument("--tokens", type=int, default=64)
    about.add_argument("--context", type=int, default=4096)
    about.add_argument(
        "--prefix-mib", type=int, default=64, help="few: full within the first third"
    )
    about.add_argument("--log", type=Path, default=Path("/dev/null"), help="output of the server")
    for found in soak(about.parse_args(words)):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
