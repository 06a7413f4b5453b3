"""Ways of a claim of `benchmarks.diffusion_claims` in turns, prompt by prompt: for small differences.

    python -m benchmarks.diffusion_pairs auto-default --folder claims --rounds 12

A round makes the models of all ways anew. Each prompt is answered in every way, in one order and in the other
by turns, so other work meets them alike. Seconds are the processor's, of one thread; printed are
the median of the quotients of the reference's seconds and a way's, their quartiles, and that of all seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.diffusion import Way
from benchmarks.diffusion_claims import CLAIMS
from benchmarks.diffusion_work import Work
from linspec.errors import ConfigError
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size


def seconds(work: Work, ways: Sequence[Way], rounds: int) -> list[list[float]]:
    """Of each way, for the prompts of all rounds."""
    found: list[list[float]] = [[] for _ in ways]
    with Progress("rounds", rounds) as progress:
        for turn in range(rounds):
            models = [way.make() for way in ways]
            for number, params in enumerate(work.params):
                order = range(len(ways)) if (turn + number) % 2 else reversed(range(len(ways)))
                for at in order:
                    began = time.process_time()
                    models[at].generate([ways[at].prompts[number]], params)
                    found[at].append(time.process_time() - began)
            progress.update(turn + 1)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print a line for each way but the reference."""
    about = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    about.add_argument("claim", choices=tuple(CLAIMS))
    about.add_argument(
        "--folder", type=Path, required=True, help="of models that are trained for the claim"
    )
    about.add_argument("--target", default="embedded-softmax", help="of specdiff")
    about.add_argument("--prompts", type=int, default=6)
    about.add_argument("--tokens", type=int, default=64, help="of a text")
    about.add_argument("--steps", type=int, default=3000, help="of training a model for the claim")
    about.add_argument("--rounds", type=int, default=12)
    given = about.parse_args(words)
    for name in ("prompts", "rounds"):
        check_size(name, getattr(given, name))
    if given.prompts * given.rounds < 2:
        raise ConfigError(
            f"a median has two pairs or more, got {given.prompts} prompts and {given.rounds} rounds"
        )
    torch.set_num_threads(1)
    claim = CLAIMS[given.claim]
    work = claim.work(given)
    ways = claim.ways(work, given)
    first, *others = seconds(work, ways, given.rounds)
    for way, mine in zip(ways[1:], others, strict=True):
        ratios = [one / other for one, other in zip(first, mine, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        together = sum(first) / sum(mine)
        print(
            f"{way.name}: {middle:.3f} of the speed of {ways[0].name} (median of {len(ratios)} pairs; "
            f"quartiles {low:.3f}, {high:.3f}; all seconds {together:.3f})"
        )


if __name__ == "__main__":
    main()
