"""One long sequence beside short ones: the line of work against a fixed split by sequences.

    python -m benchmarks.lean_attention                     # 1 x 32k + 7 x 512 keys, two threads
    python -m benchmarks.lean_attention --long 8192 --kinds float

A decoder in which attention is nearly all there is takes steps of one token for all sequences. "split": two
threads of Python, one with the long sequence and one with the others, each on one core at the same time; no
split of whole sequences is better. Both in turns; medians, and the least of each, which other processes
disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from linspec.decoding.step import StepInput
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.state.sequence_states import SequenceStates

# query heads and KV heads, of 64 features
SHAPES = {"SmolLM2": (9, 3), "embedded": (4, 2)}
_READ = 512


@dataclass(frozen=True, slots=True)
class Ragged:
    """Seconds of steps over one kind of cache; of each round."""

    shape: str
    kind: str
    lean: list[float]
    split: list[float]

    def __str__(self) -> str:
        lean, split = statistics.median(self.lean), statistics.median(self.split)
        best = min(self.split) / min(self.lean)
        return (
            f"{self.shape:9} {self.kind:6} line {1e3 * lean:7.2f} ms, split {1e3 * split:7.2f} ms, "
            f"split ÷ line {split / lean:.2f} (of the least {best:.2f})"
        )


def ragged(
    shape: str, kind: str, lengths: Sequence[int], *, layers: int = 4, repeats: int = 15
) -> Ragged:
    """Steps of all sequences by the line, and of the first beside the others by one thread each."""
    whole, *parts = (
        _steps(shape, kind, each, layers) for each in (lengths, lengths[:1], lengths[1:])
    )
    found = Ragged(shape, kind, [], [])
    # in turns, so that a slow moment meets both; the first round warms up
    for number in range(repeats + 1):
        torch.set_num_threads(2)
        lean = _timed(whole)
        torch.set_num_threads(1)
        split = _timed(lambda: _together(parts))
        if number:
            found.lean.append(lean)
            found.split.append(split)
    return found


def _steps(shape: str, kind: str, lengths: Sequence[int], layers: int) -> Callable[[], object]:
    """One step of a token for each of some sequences; a decoder of its own, as its workspace is."""
    heads, kv_heads = SHAPES[shape]
    config = DecoderConfig(
        vocab_size=64,
        width=32,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=64,
        mlp_width=32,
        max_positions=max(lengths) + _READ,
    )
    torch.manual_seed(0)
    model = Decoder(config).to_inference()
    state = model.new_state(len(lengths) + 1, kind)
    _fill(model, state, lengths)
    inputs = [StepInput(slot, [1]) for slot in range(len(lengths))]

    def step() -> None:
        model.step(inputs, state)
        for slot in range(len(lengths)):
            state.drop(slot)

    return step


@torch.inference_mode()
def _fill(model: Decoder, state: SequenceStates, lengths: Sequence[int]) -> None:
    """Sequences of so many keys: those of a short text, again and again."""
    source = len(lengths)
    model.step([StepInput(source, [index * 31 % 64 for index in range(_READ)])], state)
    state.commit(source, range(_READ))
    for part in state.parts:
        for slot, length in enumerate(lengths):
            part.hold(slot, length)
            for entries in (part.keys, part.values):
                for begin in range(0, length, _READ):
                    count = min(_READ, length - begin)
                    entries[:, slot, :, begin : begin + count] = entries[:, source, :, :count]


def _together(calls: Sequence[Callable[[], object]]) -> None:
    """All of them at the same time, one on the calling thread."""
    others = [threading.Thread(target=call) for call in calls[1:]]
    for other in others:
        other.start()
    calls[0]()
    for other in others:
        other.join()


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def rows(
    lengths: Sequence[int], kinds: Sequence[str], *, layers: int = 4, repeats: int = 15
) -> Iterator[Ragged]:
    """Every shape over every kind of cache."""
    for shape in SHAPES:
        for kind in kinds:
            yield ragged(shape, kind, lengths, layers=layers, repeats=repeats)


def main() -> None:
    """Print a line for each."""
    about = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    about.add_argument("--long", type=int, default=32768)
    about.add_argument("--short", type=int, default=512)
    about.add_argument("--others", type=int, default=7)
    about.add_argument("--kinds", default="float,int8", help="caches, by commas")
    about.add_argument("--repeats", type=int, default=15)
    given = about.parse_args()
    lengths = [given.long] + [given.short] * given.others
    for row in rows(lengths, given.kinds.split(","), repeats=given.repeats):
        print(row, flush=True)


if __name__ == "__main__":
    main()
