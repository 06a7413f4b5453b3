"""A process that holds one engine: JSON requests on stdin, one JSON answer a line on stdout.

echo '{"op": "why_not", "peer": "linspec"}' | python -m benchmarks.peers.worker
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.base import Session, peer

_WARM_TOKENS = 16
# what is not measured at the start of a turn: threads that slept may begin it on the same core
_WAKING_STEPS = 4
_WAKING_S = 0.03
_MOST_WAKING_TOKENS = 64
# a turn is at least so long, or of so many tokens
_LEAST_S = 0.15
_MOST_TOKENS = 128


class Worker:
    """Carries out requests; every public method is one."""

    def __init__(self) -> None:
        self.session: Session | None = None

    def why_not(self, peer_name: str, convert: bool) -> str | None:
        """The reason why an engine cannot be used in this interpreter."""
        return peer(peer_name).why_not(convert=convert)

    def convert(self, peer_name: str, form: str, source: str, target: str) -> None:
        """Write the engine's form of a checkpoint."""
        # the only request that wants more than the standard library beside its engine
        from linspec.utils.files import replace_dir

        engine = peer(peer_name)
        with replace_dir(Path(target)) as aside:
            engine.convert(Path(source), aside, engine.format(form))

    def load(
        self, peer_name: str, form: str, folder: str, context: int, batch: int, threads: int
    ) -> str:
        """Load a model and run it once, so that nothing is prepared while the clock runs.

        Returns the version of the engine.
        """
        engine = peer(peer_name)
        if not peer_name.startswith("linspec"):
            # linspec's own setting: other engines wait as they were made to
            os.environ.pop("GOMP_SPINCOUNT", None)
        form_ = engine.format(form)
        self.session = engine.load(Path(folder), form_, context, batch, threads)
        self.session.open([[7] * _WARM_TOKENS] * batch)
        self.session.decode(2)
        return engine.version()

    def open(self, context: int, batch: int, vocab: int, seed: int) -> float:
        """Seconds to read random prompts, equal for all engines."""
        draw = random.Random(seed)
        prompts = [[draw.randrange(5, vocab) for _ in range(context)] for _ in range(batch)]
        return self._session().open(prompts)

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of `tokens` steps, of more where they are short."""
        return _turn(self._session().decode, tokens)

    def decode_short(self, tokens: int) -> list[float] | None:
        """The same behind a short context."""
        session = self._session()
        if session.decode_short(1) is None:
            return None
        return _turn(lambda count: session.decode_short(count) or [], tokens)

    def rows(self, count: int, repeats: int) -> list[float] | None:
        """Seconds of passes over `count` rows."""
        began = time.perf_counter()
        while self._session().rows(count, 2) and time.perf_counter() - began < _WAKING_S:
            pass
        return self._session().rows(count, repeats)

    def accept(self, nodes: int, rate: float, rounds: int) -> tuple[int, float] | None:
        """Tokens and seconds of speculation at a given acceptance."""
        self._session().accept(nodes, rate, _WAKING_STEPS)
        return self._session().accept(nodes, rate, rounds)

    def peak(self) -> int:
        """Highest resident memory of this process, in bytes."""
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
        return 0

    def _session(self) -> Session:
        assert self.session is not None, "load first"
        return self.session


def _turn(decode: Callable[[int], list[float]], tokens: int) -> list[float]:
    began = time.perf_counter()
    for _ in range(_MOST_WAKING_TOKENS // _WAKING_STEPS):
        waking = decode(_WAKING_STEPS)
        if time.perf_counter() - began > _WAKING_S:
            break
    return decode(max(tokens, min(_MOST_TOKENS, int(_LEAST_S / min(waking)))))


def main() -> None:
    """Answer until stdin ends."""
    # engines print what they like: only answers may reach the reader
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        operation = request.pop("op")
        try:
            answer = {"result": getattr(worker, operation)(**request)}
        # whatever an engine raises must not end the comparison of the others
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
