"""The demo's measurements: quality, decoding with and without drafts, state, speed at context."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from linspec.bench.speed import SpeedRow, bench
from linspec.checkpoints.dtype import cache_kind
from linspec.checkpoints.hub import load_model, load_tokenizer
from linspec.decoding.sampling import SamplingParams
from linspec.demo.budget import Budget, Clock
from linspec.demo.result import STUDENT, TEACHER, Decoded
from linspec.demo.work import Work
from linspec.errors import LinspecError
from linspec.evaluate.lossless import divergence
from linspec.evaluate.perplexity import evaluate
from linspec.llm import LLM, Generation
from linspec.models.decoder import Decoder
from linspec.utils.progress import Progress

NONE = "none"
STATE_CONTEXTS = (1024, 8192, 32768)
_SIGNATURE = re.compile(r"^ *def .*:\n", re.M)
_CHARACTERS_BEFORE = 1200
_LEAST_PROMPTS = 2
_LEAST_CONTEXTS = 2
# how much longer the next context is expected to take than the last one
_GROWTH = 4


@dataclass(frozen=True, slots=True)
class Scores:
    """Held-out bits per byte by model, and on how many bytes."""

    bits_per_byte: Mapping[str, float]
    bytes: int


def cut(documents: Sequence[str], longest: int, seed: int) -> list[str]:
    """A random piece of every document: a few large files must not decide the figure."""
    rng = random.Random(seed)
    begins = [rng.randrange(max(1, len(text) - longest)) for text in documents]
    return [text[begin : begin + longest] for text, begin in zip(documents, begins, strict=True)]


def score_models(
    models: Mapping[str, Callable[[], Decoder]],
    tokenizer: Any,
    documents: Sequence[str],
    budget: Budget,
    work: Work,
    clock: Clock = time.monotonic,
) -> Scores:
    """Evaluate every model on the same bytes, as many as the time allows; kept for the next run."""
    known: dict[str, float] = dict(work.recall("bits_per_byte") or {})
    size = work.recall("eval_bytes")
    for name, load in models.items():
        if name in known:
            continue
        model = load()
        if size is None:
            began = clock()
            least = budget.eval_bytes // 20
            evaluate(model, tokenizer, documents, limit_bytes=least)
            share = budget.evaluate / (len(models) + 0.5)
            fitting = int(least * share / max(clock() - began, 1e-9))
            size = max(least, min(budget.eval_bytes, fitting))
            work.note("eval_bytes", size)
        score = evaluate(model, tokenizer, documents, limit_bytes=size)
        known[name] = round(score.bits_per_byte, 5)
        work.note("bits_per_byte", known)
    return Scores(known, int(size or 0))


@dataclass(slots=True)
class Lane:
    """One model with one drafter, and what its generations brought so far."""

    model: str
    drafter: str
    llm: LLM
    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    accepted: int = 0
    tried: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    lossless: bool = True
    near_ties: int = 0

    def take(self, done: Generation) -> None:
        """Add one generation."""
        stats = done.stats
        self.tokens += len(done.token_ids) - 1
        self.seconds += stats.decode_seconds
        self.rounds += stats.rounds
        self.accepted += stats.accepted
        for depth, (tried, hits) in enumerate(zip(stats.tried, stats.hits, strict=True)):
            if depth == len(self.tried):
                self.tried.append(0)
                self.hits.append(0)
            self.tried[depth] += tried
            self.hits[depth] += hits

    def compare(self, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int]) -> None:
        """Note whether `got` is what plain decoding gave."""
        found = divergence(self.llm.model, 0, prompt, expected, got, self.llm.kv_cache_dtype)
        if found is not None and found.near_tie:
            self.near_ties += 1
        elif found is not None:
            self.lossless = False

    def result(self) -> Decoded:
        """The figures of all generations together."""
        return Decoded(
            model=self.model,
            drafter=self.drafter,
            tokens_per_s=round(self.tokens / self.seconds, 2) if self.seconds else 0.0,
            tokens_per_round=round(1 + self.accepted / self.rounds, 3) if self.rounds else 1.0,
            tokens=self.tokens,
            acceptance=tuple(round(h / t, 4) for h, t in zip(self.hits, self.tried, strict=True)),
            lossless=self.lossless,
            near_ties=self.near_ties,
        )


def pick_prompts(
    tokenizer: Any, documents: Sequence[str], count: int, longest: int
) -> list[list[int]]:
    """Token ids of `count` prompts that end behind a function's signature where there is one."""
    found: list[list[int]] = []
    # tests hold tables of data, which are dull to read: they come last
    for text in sorted(documents, key=lambda text: "unittest" in text):
        ends = [match.end() for match in _SIGNATURE.finditer(text) if match.end() > 400]
        end = ends[len(ends) // 2] if ends else len(text) // 2
        part = text[max(0, end - _CHARACTERS_BEFORE) : end]
        # whole lines read better
        part = part[part.find("\n") + 1 :] if len(part) == _CHARACTERS_BEFORE else part
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if ids and (ends or len(documents) <= count):
            found.append(ids[-longest:])
        if len(found) == count:
            break
    return found


def decode_lanes(
    lanes: Sequence[Lane],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    deadline: float,
    clock: Clock = time.monotonic,
) -> list[Decoded]:
    """Every lane on every prompt, in turns, so that a busy machine is busy for all of them.

    The first lane of a model must be plain: the others are compared with it. After `deadline` (on
    `clock`) no further prompt is begun, but two are always done.
    """
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    for lane in lanes:
        lane.llm.generate([prompts[0]], replace(params, max_tokens=min(8, new_tokens)))
    with Progress("decode", len(lanes) * len(prompts)) as progress:
        for at, prompt in enumerate(prompts):
            if at >= _LEAST_PROMPTS and clock() > deadline:
                break
            plain: dict[str, Sequence[int]] = {}
            for number, lane in enumerate(lanes, 1):
                done = lane.llm.generate([prompt], params)[0]
                lane.take(done)
                lane.compare(prompt, plain.setdefault(lane.model, done.token_ids), done.token_ids)
                progress.update(at * len(lanes) + number, f"{lane.model}, {lane.drafter}")
    return [lane.result() for lane in lanes]


def state_bytes(model: Decoder, contexts: Sequence[int] = STATE_CONTEXTS) -> dict[int, int]:
    """Bytes that one sequence's committed state needs at each context."""
    state = model.new_state(1, cache_kind("auto", model))
    return {context: state.bytes_at(context) for context in contexts}


@dataclass(frozen=True, slots=True)
class ContextSpeed:
    """Rows of both models over contexts, and what had to be left out."""

    rows: Mapping[str, tuple[SpeedRow, ...]]
    note: str


def speed_at_contexts(
    teacher: str | Path,
    student: Path,
    data: Sequence[str | Path],
    budget: Budget,
    deadline: float,
    clock: Clock = time.monotonic,
) -> ContextSpeed:
    """Milliseconds per token of both models, plain and speculative, as far as the time allows.

    Two contexts are always measured: one point is no curve. The teacher's limit of positions is
    lifted: its speed there is real, its text means nothing, so that nothing drafts for it there.
    """
    rows: dict[str, list[SpeedRow]] = {TEACHER: [], STUDENT: []}
    note, took = "", 0.0
    for at, context in enumerate(budget.contexts):
        # reading with softmax attention costs more than the context grows
        if at >= _LEAST_CONTEXTS and clock() + _GROWTH * took > deadline:
            note = f"The time was up before {context} tokens of context."
            break
        began = clock()
        try:
            rows[TEACHER] += _teacher_speed(teacher, student, context, data, budget)
            rows[STUDENT] += _speed(student, context, ["medusa"], None, data, budget)
        except LinspecError as error:
            note = f"Speed at {context} tokens of context was not measured: {error}"
            break
        took = clock() - began
    return ContextSpeed({model: tuple(found) for model, found in rows.items()}, note)


def _teacher_speed(
    teacher: str | Path, student: Path, context: int, data: Sequence[str | Path], budget: Budget
) -> tuple[SpeedRow, ...]:
    model = load_model(teacher)
    needed, limit = context + budget.speed_tokens, model.config.max_positions
    drafters = [f"student:{student}"] if needed <= limit else []
    model.config = replace(model.config, max_positions=max(limit, needed))
    return _speed(model, context, drafters, load_tokenizer(teacher), data, budget)


def _speed(
    model: Decoder | Path,
    context: int,
    drafters: Sequence[str],
    tokenizer: Any,
    data: Sequence[str | Path],
    budget: Budget,
) -> tuple[SpeedRow, ...]:
    measured = bench(
        model,
        [context],
        drafters,
        tokenizer=tokenizer,
        tokens=budget.speed_tokens,
        repeats=budget.speed_repeats,
        data=data,
    )
    return measured.rows
