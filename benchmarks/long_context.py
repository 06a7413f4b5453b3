"""Long contexts: what a way to read the past recalls, and what it costs.

    python -m benchmarks.long_context --out results.jsonl
    python -m benchmarks.long_context --out results.jsonl --ways int8 "codes 1024" --lengths 4096
    python -m benchmarks.long_context --out results.jsonl --ways int8 lserve:exact=25% --model MODEL

For each way and length: needles found (one in the text, and six of which each is asked for), bits per token
of the last tokens of running text, bytes of the state, seconds to the first token and of a step behind it, by
the clock and of processor time. A way is a name of `WAYS` or a spec of `--attention`. A cell that is in the
file already is not measured again. Speeds of all ways at one length are taken in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.long_context_bytes import bytes_of, offloaded_bytes
from benchmarks.long_context_ways import WAYS, way_of
from linspec.decoding.step import StepInput
from linspec.evaluate.needles import CLEAR, NAMES, WORDING, WORDINGS
from linspec.evaluate.perplexity import held_out_documents
from linspec.evaluate.ruler import evaluate_ruler
from linspec.llm import LLM
from linspec.state.sequence_states import SequenceStates
from linspec.train.data import end_of_text, tokenize
from linspec.train.needles import Needles, NeedleWriter
from linspec.utils.progress import Progress

_DEPTHS, _SCORED, _STEPS, _WARM = 10, 256, 24, 3
_KEYS = (1, 6)
# tokens of a text that are read at once
_SLICE = 2048


def read(llm: LLM, tokens: Sequence[int], wanted: Sequence[int]) -> tuple[SequenceStates, Any]:
    """A state that holds `tokens`, and the logits of those at the `wanted` places, which rise."""
    state = llm.model.new_state(1, llm.kv_cache_dtype)
    logits = []
    for begin in range(0, len(tokens), _SLICE):
        piece = list(tokens[begin : begin + _SLICE])
        places = [place - begin for place in wanted if begin <= place < begin + len(piece)]
        out = llm.model.step([StepInput(0, piece, logits_of=places)], state)
        state.commit(0, range(len(piece)))
        logits.append(out.logits)
    return state, torch.cat(logits)


def found(llm: LLM, needles: Needles, keys: int) -> tuple[list[bool], int]:
    """Which of the needles are said right in every digit, given the digits before: a forward a text.

    And the most bytes that a state has behind one.
    """
    right, most = list[bool](), 0
    label = f"{keys} of {needles.tokens.shape[1]} tokens"
    with Progress(label, len(needles.tokens)) as progress:
        for done, (tokens, places) in enumerate(
            zip(needles.tokens, needles.places, strict=True), 1
        ):
            state, logits = read(llm, tokens[: int(places[-1])].tolist(), (places - 1).tolist())
            hit = logits.argmax(-1) == tokens[places]
            right += hit.unflatten(0, (keys, -1)).all(1).tolist()
            most = max(most, state.bytes(0))
            progress.update(done, f"found {sum(right)} of {len(right)}")
    return right, most


def needles_of(
    llm: LLM, stream: np.ndarray, length: int, keys: int, texts: int, *, apart: bool = False
) -> Needles:
    """Texts with `keys` needles, each of which is asked for; the first at ten depths in turn.

    apart: each has a wording of its own.
    """
    wordings = WORDINGS if apart else (WORDING,)
    writer = NeedleWriter(llm.tokenizer, stream, wordings, NAMES, clear=CLEAR)
    rng = random.Random(f"long {length} {keys}")
    made = [
        writer.batch(
            1,
            length,
            keys=keys,
            asked=keys,
            rng=rng,
            depth=(text % _DEPTHS + 0.5) / _DEPTHS,
            apart=apart,
        )
        for text in range(texts)
    ]
    return Needles(
        torch.cat([each.tokens for each in made]), torch.cat([each.places for each in made])
    )


def quality(
    llm: LLM,
    stream: np.ndarray,
    length: int,
    items: int,
    kinds: Sequence[int],
    texts: int,
    apart: bool = False,
) -> dict[str, Any]:
    """Needles that are found, bytes of the state, and bits per token at the end of running text.

    apart: what one needle in a text would ask is asked of texts with one needle of each wording.
    """
    result: dict[str, Any] = {"state_bytes": 0, "apart": apart}
    for keys in kinds:
        alone = apart and keys == 1
        in_text = len(WORDINGS) if alone else keys
        needles = needles_of(llm, stream, length, in_text, -(-items // in_text), apart=alone)
        hits, size = found(llm, needles, in_text)
        result[f"needles_{keys}"], result[f"asked_{keys}"] = sum(hits), len(hits)
        # question by question: all ways are asked the same
        result[f"right_{keys}"] = "".join(str(int(hit)) for hit in hits)
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
    """Seconds to the first token, and the times of single steps behind it: all ways in turns.

    Both by the clock, and of processor time of all threads, which other programs change less.
    """
    states: dict[str, SequenceStates] = {}
    times: dict[str, list[Times]] = {name: [] for name in ways}
    first: dict[str, Times] = {}
    with Progress(f"speed at {len(text)} tokens", len(ways)) as progress:
        for done, (name, llm) in enumerate(ways.items(), 1):
            began = Times.now()
            states[name], _ = read(llm, text, [len(text) - 1])
            first[name] = began.since()
            progress.update(done, name)
    for _ in range(_WARM + _STEPS):
        for name, llm in ways.items():
            began = Times.now()
            llm.model.step([StepInput(0, [text[-1]])], states[name])
            states[name].commit(0, [0])
            times[name].append(began.since())
    for name in ways:
        clock, worked = (sorted(each) for each in zip(*times[name][_WARM:], strict=True))
        yield (
            name,
            {
                "first_token_s": first[name].clock,
                "first_token_processor_s": first[name].processor,
                "tokens_per_second": 1 / statistics.median(clock),
                "quartiles_ms": [1000 * clock[len(clock) * q // 4] for q in (1, 3)],
                "processor_ms": 1000 * statistics.median(worked),
                "least_processor_ms": 1000 * worked[0],
                "state_bytes": states[name].bytes(0),
            },
        )


class Times(NamedTuple):
    """Seconds by the clock, and of processor time."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> Times:
        """At this moment."""
        return cls(time.perf_counter(), time.process_time())

    def since(self) -> Times:
        """From then to now."""
        now = Times.now()
        return Times(now.clock - self.clock, now.processor - self.processor)


def kept(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What was measured already, by way, length and kind."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["way"], row["length"], row["kind"]): row for row in rows}


def measure(options: argparse.Namespace) -> None:
    """Every cell that is missing, shortest texts first, each written as it is done."""
    done, loaded = kept(options.out), {}
    for name in options.ways:
        loaded[name] = way_of(name).load(options.model, options.quantize)
    first = loaded[options.ways[0]]
    end = end_of_text(first.tokenizer, first.model.config)
    stream = tokenize(held_out_documents(options.data), first.tokenizer, end)
    for length in options.lengths:
        for name, llm in loaded.items():
            if options.ruler and (name, length, "ruler") not in done:
                _write(options, name, length, "ruler", ruler(llm, length, options))
            if options.speed_only or (name, length, "quality") in done:
                continue
            asked = options.items, options.keys, options.texts, options.apart
            _write(options, name, length, "quality", quality(llm, stream, length, *asked))
        missing = {n: llm for n, llm in loaded.items() if (n, length, "speed") not in done}
        if missing and not options.quality_only:
            for name, row in speeds(missing, stream[:length].tolist()):
                _write(options, name, length, "speed", row)


def _write(
    options: argparse.Namespace, way: str, length: int, kind: str, row: dict[str, Any]
) -> None:
    model = {**asdict(way_of(way)), **({"model": options.model} if options.model else {})}
    found = {"way": way, "length": length, "kind": kind, **model, **row}
    if "state_bytes" in row:
        found["read_bytes"] = bytes_of(found)[1]
        found["memory_bytes"] = row["state_bytes"] - offloaded_bytes(found)
    line = json.dumps(found)
    print(line, flush=True)
    with options.out.open("a") as out:
        out.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file, which is added to")
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), help="names of ways, or specs of --attention"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--items", type=int, default=20, help="needles that are asked for")
    parser.add_argument("--keys", nargs="+", type=int, default=_KEYS, help="needles in a text")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="for one needle: a text with one of each of five wordings",
    )
    parser.add_argument("--ruler", type=int, default=0, help="questions of each task of RULER")
    parser.add_argument("--texts", type=int, default=4, help="running texts whose ends are scored")
    parser.add_argument(
        "--model", help="another model for all ways, such as one with a longer limit"
    )
    parser.add_argument("--quantize", type=int, choices=(8, 4), help="bits of the weights")
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="running text")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--speed-only", action="store_true")
    only.add_argument("--quality-only", action="store_true")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
