"""Every drafter on one model, in one run: how fast, and how often its drafts are accepted.

    report = bench_drafters("embedded-aug")
    for row in report.rows:
        print(row.drafter, row.times_plain, row.acceptance)

Speed is measured as `bench` does, with the policy asked for, which may draft nothing where drafts do not
pay. Acceptance is measured apart, untimed, with the same number of draft nodes in every round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linspec.bench.speed import PLAIN, Speed, bench
from linspec.checkpoints.hub import load_tokenizer, resolve
from linspec.checkpoints.load_quantized import load_for
from linspec.decoding.sampling import SamplingParams
from linspec.drafters import DRAFTERS, Drafter, DrafterContext
from linspec.errors import ConfigError, LinspecError
from linspec.evaluate.lossless import sample_prompts
from linspec.evaluate.perplexity import held_out_documents
from linspec.llm import LLM
from linspec.train.data import Sources, check_sources


@dataclass(frozen=True, slots=True)
class DrafterRow:
    """One drafter, or plain decoding.

    tokens_per_s, tokens_per_round, spread: of the timed run (see `SpeedRow`); times_plain: its speed
    over that of plain decoding. fixed_tokens_per_round and acceptance: with a fixed number of draft
    nodes; `acceptance[d]` of the drafts at depth d + 1 whose parent was accepted were accepted too.
    """

    drafter: str
    tokens_per_s: float
    times_plain: float
    tokens_per_round: float
    spread: float
    fixed_tokens_per_round: float
    acceptance: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DrafterSpeeds:
    """A whole run: where, how, a row for each drafter, and those that were left out with the reason."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[DrafterRow, ...]
    skipped: tuple[dict[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def bench_drafters(
    model: str | Path,
    drafters: Sequence[str] = (),
    *,
    context: int = 128,
    tokens: int = 64,
    repeats: int = 5,
    policy: str | int = "auto",
    nodes: int = 12,
    prompts: int = 8,
    data: Sources = ("stdlib",),
    quantize: int | None = None,
    kv: str = "float",
    device: str = "cpu",
) -> DrafterSpeeds:
    """Compare drafters after `context` tokens of held-out text.

    drafters: specs; where none are given, every registered drafter that can be made for this model
    without being told more. nodes: of every tree where acceptance is measured, on `prompts` pieces of
    held-out text. Raises ConfigError when nothing can draft, and what `bench` raises.
    """
    if nodes < 1 or prompts < 1:
        raise ConfigError(f"nodes and prompts must be 1 or more, got {nodes} and {prompts}")
    data = check_sources(data)
    source, tokenizer = resolve(model), load_tokenizer(model)
    loaded = load_for(model, quantize, device=device)
    found = DrafterContext(loaded, tokenizer, source)
    made, skipped = _make(drafters, found)
    measured = bench(
        loaded,
        [context],
        made,
        tokenizer=tokenizer,
        tokens=tokens,
        repeats=repeats,
        policy=policy,
        data=data,
        kv=kv,
    )
    if measured.skipped:
        raise ConfigError(measured.skipped[0]["reason"])
    common = {"tokenizer": tokenizer, "policy": nodes, "max_batch": 1, "kv": kv}
    texts = sample_prompts(LLM(loaded, **common), held_out_documents(data), prompts, tokens, 0)
    accepted = {
        name: _accepted(LLM(loaded, drafter=drafter, **common), texts, tokens)
        for name, drafter in made.items()
    }
    settings = {
        "model": str(model),
        **measured.settings,
        "context": context,
        "nodes": nodes,
        "prompts": prompts,
    }
    return DrafterSpeeds(measured.machine, settings, _rows(measured, accepted), tuple(skipped))


def _make(
    specs: Sequence[str], context: DrafterContext
) -> tuple[dict[str, Drafter], list[dict[str, str]]]:
    """The drafters, and which were left out; one that was asked for by name must work."""
    if specs:
        return {spec: DRAFTERS.build(spec, context) for spec in specs}, []
    made, skipped = dict[str, Drafter](), list[dict[str, str]]()
    for name in DRAFTERS.names():
        try:
            made[name] = DRAFTERS.build(name, context)
        except LinspecError as error:
            skipped.append({"drafter": name, "reason": str(error)})
    if not made:
        reasons = "; ".join(f"{each['drafter']}: {each['reason']}" for each in skipped)
        raise ConfigError(f"no drafter can be made for this model: {reasons}")
    return made, skipped


def _accepted(
    llm: LLM, prompts: Sequence[list[int]], tokens: int
) -> tuple[float, tuple[float, ...]]:
    """Tokens per round over all prompts, and the share of accepted drafts by depth."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    stats = [result.stats for result in llm.generate(list(prompts), params)]
    rounds, hits = sum(s.rounds for s in stats), sum(s.accepted for s in stats)
    depths = range(max((len(s.tried) for s in stats), default=0))
    shares = [
        sum(s.hits[d] for s in stats if d < len(s.hits))
        / sum(s.tried[d] for s in stats if d < len(s.tried))
        for d in depths
    ]
    return 1 + hits / max(1, rounds), tuple(round(share, 4) for share in shares)


def _rows(
    measured: Speed, accepted: Mapping[str, tuple[float, tuple[float, ...]]]
) -> tuple[DrafterRow, ...]:
    plain = next(row for row in measured.rows if row.mode == PLAIN)
    rows = []
    for row in measured.rows:
        per_round, acceptance = accepted.get(row.mode, (1.0, ()))
        rows.append(
            DrafterRow(
                drafter=row.mode,
                tokens_per_s=row.tokens_per_s,
                times_plain=round(row.tokens_per_s / plain.tokens_per_s, 3),
                tokens_per_round=row.tokens_per_round,
                spread=row.spread,
                fixed_tokens_per_round=round(per_round, 3),
                acceptance=acceptance,
            )
        )
    return tuple(rows)
