"""Masked diffusion on long canvases: what a forward costs, and what a state holds, of several models.

    python -m benchmarks.diffusion_lengths embedded-diffusion path/to/linearized --lengths 1024 4096
    python -m benchmarks.diffusion_lengths path/to/linearized --by-layers    # and without the call into C

Models take turns, the first one is what others are compared with. Seconds are the processor's, of one thread:
of a forward over the whole canvas, and of one over a block of it. Canvases may be longer than a model has
learned; that changes what it says, not what it costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from linspec.bench.machine import machine
from linspec.checkpoints.hub import load_diffusion
from linspec.decoding.step import StepInput
from linspec.errors import ConfigError
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.state.sequence_states import SequenceStates
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size

Cell = tuple[str, int, str]


def endless(source: str) -> MaskedDiffusion:
    """The model as it decodes, with room for canvases of any length."""
    model = load_diffusion(source)
    model.position_limit = None
    model.to_inference()
    return model


def by_layers(source: str) -> MaskedDiffusion:
    """The same model, which runs layer by layer."""
    model = endless(source)
    model.native = None
    return model


def seconds(
    model: MaskedDiffusion, state: SequenceStates, length: int, block: int, rounds: int
) -> dict[str, list[float]]:
    """Of forwards over a whole canvas, and over its last block, each `rounds` times after a first one."""
    state.hold(0, length)
    rows = {"whole": range(length), "block": range(length - block, length)}
    found: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, positions in rows.items():
            tokens = [at % model.config.mask_id for at in positions]
            given = StepInput(0, tokens, overwrite=positions, causal=False, logits_of=[0])
            began = time.process_time()
            model.step([given], state)
            if turn:
                found[name].append(time.process_time() - began)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print a line for each model and length."""
    about = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    about.add_argument(
        "models", nargs="+", help="masked-diffusion models, the one to compare with first"
    )
    about.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096])
    about.add_argument("--block", type=int, default=32, help="positions of a block")
    about.add_argument(
        "--by-layers", action="store_true", help="also measure each model layer by layer"
    )
    about.add_argument("--turns", type=int, default=3, help="of all models")
    about.add_argument("--rounds", type=int, default=3, help="forwards of each kind in a turn")
    about.add_argument(
        "--json", action="store_true", help="a line of JSON for each model and length"
    )
    given = about.parse_args(words)
    for name in ("block", "turns", "rounds"):
        check_size(name, getattr(given, name))
    if min(given.lengths) < given.block:
        raise ConfigError(
            f"lengths must be {given.block} or more, a block, got {min(given.lengths)}"
        )
    torch.set_num_threads(1)
    models = {source: endless(source) for source in given.models}
    if given.by_layers:
        models |= {f"{source} by layers": by_layers(source) for source in given.models}
    found: dict[Cell, list[float]] = {}
    mib: dict[tuple[str, int], float] = {}
    with Progress("forwards", given.turns * len(given.lengths) * len(models)) as progress:
        done = 0
        for _ in range(given.turns):
            for length in given.lengths:
                for source, model in models.items():
                    state = model.new_state()
                    measured = seconds(model, state, length, given.block, given.rounds)
                    # as much as it holds after these
                    mib[source, length] = sum(part.bytes(0) for part in state.parts) / 2**20
                    for kind, some in measured.items():
                        found.setdefault((source, length, kind), []).extend(some)
                    done += 1
                    progress.update(done, f"{source} {length}")
    for length in given.lengths:
        for source in models:
            line = {"model": source, "length": length, "state_mib": mib[source, length]}
            for kind in ("whole", "block"):
                mine = statistics.median(found[source, length, kind])
                first = statistics.median(found[given.models[0], length, kind])
                line |= {f"{kind}_ms": 1e3 * mine, f"{kind}_times": mine / first}
            print(json.dumps(line | {"machine": machine()}) if given.json else _shown(line))


def _shown(line: dict[str, object]) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in line.items()
    )


if __name__ == "__main__":
    main()
