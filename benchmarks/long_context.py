"""Long contexts: what a way to read the past recalls, and what it costs.

    python -m benchmarks.long_context --out results.jsonl
    python -m benchmarks.long_context --out results.jsonl --ways int8 "codes 1024" --lengths 4096

For each way and length: needles found (one in the text, and six of which each is asked for), bits per byte of
the last tokens of running text, bytes of the state, seconds to the first token, tokens per second behind it.
A cell that is in the file already is not measured again. Speeds of all ways at one length are taken in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from linspec.decoding.step import StepInput
from linspec.evaluate.needles import CLEAR, NAMES, WORDING
from linspec.evaluate.perplexity import held_out_documents
from linspec.evaluate.ruler import evaluate_ruler
from linspec.llm import LLM
from linspec.state.sequence_states import SequenceStates
from linspec.train.data import end_of_text, tokenize
from linspec.train.needles import Needles, NeedleWriter

_DEPTHS, _SCORED, _STEPS, _WARM = 10, 256, 24, 3
_KEYS = (1, 6)


@dataclass(frozen=True, slots=True)
class Way:
    """A model, how its cache is kept, and what its softmax layers read of it."""

    model: str = "smollm2"
    kv: str = "int8"
    attention: str | None = None
    rope_scaling: str | None = None

    def load(self, model: str | None) -> LLM:
        """The way, of another model where one is named."""
        return LLM(
            model or self.model,
            kv_cache_dtype=self.kv,
            attention=self.attention,
            rope_scaling=self.rope_scaling,
        )


WAYS = {
    "float32": Way(kv="float32"),
    "int8": Way(),
    "int4": Way(kv="int4"),
    "codes 512": Way(attention="pages:budget=512,judge=codes"),
    "codes 1024": Way(attention="pages:budget=1024,judge=codes"),
    "codes 2048": Way(attention="pages:budget=2048,judge=codes"),
    "bounds 512": Way(attention="pages:budget=512,judge=bounds"),
    "bounds 1024": Way(attention="pages:budget=1024,judge=bounds"),
    "bounds 2048": Way(attention="pages:budget=2048,judge=bounds"),
    # no caches, and their rows beside two near groups are as many
    "h2o 512": Way(kv="auto", attention="h2o:budget=512"),
    "h2o 1024": Way(kv="auto", attention="h2o:budget=1024"),
    "snapkv 512": Way(kv="auto", attention="snapkv:budget=512"),
    "snapkv 1024": Way(kv="auto", attention="snapkv:budget=1024"),
    "streaming 512": Way(kv="auto", attention="streaming:span=10,sinks=4"),
    "streaming 1024": Way(kv="auto", attention="streaming:span=18,sinks=4"),
    "shadow 512": Way(kv="auto", attention="shadow:budget=512"),
    "shadow 1024": Way(kv="auto", attention="shadow:budget=1024"),
    "delta 0.5": Way(attention="delta:threshold=0.5"),
    "delta 1": Way(attention="delta:threshold=1"),
    "delta 2": Way(attention="delta:threshold=2"),
    "tidal 256": Way(attention="tidal:budget=256,first=2,again=13"),
    "tidal 256, again 8": Way(attention="tidal:budget=256,first=2,again=8"),
    "tidal 256, again 10": Way(attention="tidal:budget=256,first=2,again=10"),
    "tidal 256, again 16": Way(attention="tidal:budget=256,first=2,again=16"),
    "int8, yarn": Way(rope_scaling="yarn:4"),
    "codes 1024, yarn": Way(attention="pages:budget=1024,judge=codes", rope_scaling="yarn:4"),
    "codes 2048, yarn": Way(attention="pages:budget=2048,judge=codes", rope_scaling="yarn:4"),
    "lserve 1024": Way(attention="lserve:budget=1024"),
    "lserve 1024, 22 heads": Way(attention="lserve:budget=1024,exact=22"),
    "lserve 2048": Way(attention="lserve:budget=2048"),
    "lserve all": Way(attention="lserve:budget=32768"),
    "smollm2-aug": Way(model="smollm2-aug"),
    "smollm2-aug, codes 512": Way(model="smollm2-aug", attention="pages:budget=512,judge=codes"),
    "smollm2-aug, codes 1024": Way(model="smollm2-aug", attention="pages:budget=1024,judge=codes"),
    "smollm2-aug, bounds 1024": Way(
        model="smollm2-aug", attention="pages:budget=1024,judge=bounds"
    ),
    "smollm2-aug-22": Way(model="smollm2-aug-22"),
}


def read(llm: LLM, tokens: Sequence[int], wanted: Sequence[int]) -> tuple[SequenceStates, Any]:
    """A state that holds `tokens`, and the logits of those at the `wanted` places."""
    state = llm.model.new_state(1, llm.kv_cache_dtype)
    out = llm.model.step([StepInput(0, list(tokens), logits_of=list(wanted))], state)
    state.commit(0, range(len(tokens)))
    return state, out.logits


def found(llm: LLM, needles: Needles, keys: int) -> tuple[list[bool], int]:
    """Which of the needles are said right in every digit, given the digits before: a forward a text.

    And the most bytes that a state has behind one.
    """
    right, most = list[bool](), 0
    for tokens, places in zip(needles.tokens, needles.places, strict=True):
        state, logits = read(llm, tokens[: int(places[-1])].tolist(), (places - 1).tolist())
        hit = logits.argmax(-1) == tokens[places]
        right += hit.unflatten(0, (keys, -1)).all(1).tolist()
        most = max(most, state.bytes(0))
    return right, most


def needles_of(llm: LLM, stream: np.ndarray, length: int, keys: int, texts: int) -> Needles:
    """Texts with `keys` needles, each of which is asked for; the first at ten depths in turn."""
    writer = NeedleWriter(llm.tokenizer, stream, (WORDING,), NAMES, clear=CLEAR)
    rng = random.Random(f"long {length} {keys}")
    made = [
        writer.batch(
            1, length, keys=keys, asked=keys, rng=rng, depth=(text % _DEPTHS + 0.5) / _DEPTHS
        )
        for text in range(texts)
    ]
    return Needles(
        torch.cat([each.tokens for each in made]), torch.cat([each.places for each in made])
    )


def quality(
    llm: LLM, stream: np.ndarray, length: int, items: int, kinds: Sequence[int], texts: int
) -> dict[str, Any]:
    """Needles that are found, bytes of the state, and bits per token at the end of running text."""
    result: dict[str, Any] = {"state_bytes": 0}
    for keys in kinds:
        needles = needles_of(llm, stream, length, keys, -(-items // keys))
        hits, size = found(llm, needles, keys)
        result[f"needles_{keys}"], result[f"asked_{keys}"] = sum(hits), len(hits)
        result["state_bytes"] = max(size, result["state_bytes"])
    running = [stream[at : at + length + 1] for at in range(0, texts * length, length)]
    bits = [bits_at_end(llm, text.tolist()) for text in running if len(text) == length + 1]
    return result | ({"bits_per_token": statistics.mean(bits)} if bits else {})


def ruler(llm: LLM, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of the tasks of RULER; see `linspec.evaluate.ruler`."""
    found = evaluate_ruler(llm, lengths=(length,), samples=options.ruler, data=options.data)
    return {"samples": options.ruler, **{cell.task: cell.score for cell in found.cells}}


def bits_at_end(llm: LLM, text: Sequence[int]) -> float:
    """Mean bits of the last tokens of a text, given all of it before them."""
    places = range(len(text) - 1 - _SCORED, len(text) - 1)
    _, logits = read(llm, text[:-1], places)
    nats = F.cross_entropy(logits, torch.tensor(text[-_SCORED:]))
    return float(nats) / math.log(2)


def speeds(ways: dict[str, LLM], text: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds to the first token, and the times of single steps behind it: all ways in turns."""
    states: dict[str, SequenceStates] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, float] = {}
    for name, llm in ways.items():
        began = time.perf_counter()
        states[name], _ = read(llm, text, [len(text) - 1])
        first[name] = time.perf_counter() - began
    for _ in range(_WARM + _STEPS):
        for name, llm in ways.items():
            began = time.perf_counter()
            llm.model.step([StepInput(0, [text[-1]])], states[name])
            states[name].commit(0, [0])
            times[name].append(time.perf_counter() - began)
    for name in ways:
        steps = sorted(times[name][_WARM:])
        yield (
            name,
            {
                "first_token_s": first[name],
                "tokens_per_second": 1 / statistics.median(steps),
                "quartiles_ms": [1000 * steps[len(steps) * q // 4] for q in (1, 3)],
                "state_bytes": states[name].bytes(0),
            },
        )


def kept(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What was measured already, by way, length and kind."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["way"], row["length"], row["kind"]): row for row in rows}


def measure(options: argparse.Namespace) -> None:
    """Every cell that is missing, shortest texts first, each written as it is done."""
    names = [name for name in options.ways if name in WAYS]
    done, loaded = kept(options.out), {}
    for name in names:
        loaded[name] = WAYS[name].load(options.model)
    first = loaded[names[0]]
    end = end_of_text(first.tokenizer, first.model.config)
    stream = tokenize(held_out_documents(options.data), first.tokenizer, end)
    for length in options.lengths:
        for name, llm in loaded.items():
            if options.ruler and (name, length, "ruler") not in done:
                _write(options, name, length, "ruler", ruler(llm, length, options))
            if options.speed_only or (name, length, "quality") in done:
                continue
            asked = options.items, options.keys, options.texts
            _write(options, name, length, "quality", quality(llm, stream, length, *asked))
        missing = {n: llm for n, llm in loaded.items() if (n, length, "speed") not in done}
        if missing and not options.quality_only:
            for name, row in speeds(missing, stream[:length].tolist()):
                _write(options, name, length, "speed", row)


def _write(
    options: argparse.Namespace, way: str, length: int, kind: str, row: dict[str, Any]
) -> None:
    model = {**asdict(WAYS[way]), **({"model": options.model} if options.model else {})}
    line = json.dumps({"way": way, "length": length, "kind": kind, **model, **row})
    print(line, flush=True)
    with options.out.open("a") as out:
        out.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file, which is added to")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--items", type=int, default=20, help="needles that are asked for")
    parser.add_argument("--keys", nargs="+", type=int, default=_KEYS, help="needles in a text")
    parser.add_argument("--ruler", type=int, default=0, help="questions of each task of RULER")
    parser.add_argument("--texts", type=int, default=4, help="running texts whose ends are scored")
    parser.add_argument(
        "--model", help="another model for all ways, such as one with a longer limit"
    )
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="running text")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--speed-only", action="store_true")
    only.add_argument("--quality-only", action="store_true")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
