"""Every drafter on one model and the same prompts, in one process: what it brings, and what it costs.

    report = bench_drafters("smollm2", ["medusa", "prompt-lookup"], prompts="spec_bench.jsonl")
    for row in report.rows:
        print(row.family, row.drafter, row.times_plain, row.tokens_per_round)

Modes take turns on each group of prompts, plain decoding first and last; every second group goes through them
backwards. A drafter whose greedy output is not that of plain decoding gets no row, unless the verifier or the
generation loop is one that is registered as lossy: then its row says so, and how far the outputs agree.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from linspec.bench.machine import machine
from linspec.bench.oracle import oracle
from linspec.bench.prompts import BenchPrompt, held_out_prompts, read_prompts
from linspec.bench.runs import Measured, Mode, Run, Watched, run_of, speed_up
from linspec.checkpoints.attention import attending
from linspec.checkpoints.hub import load_tokenizer, resolve
from linspec.checkpoints.load_quantized import load_for
from linspec.decoding.sampling import SamplingParams
from linspec.drafters import DRAFTERS, Drafter, DrafterContext
from linspec.engine.encoding import TextEncoder
from linspec.errors import ConfigError, LinspecError
from linspec.evaluate.lossless import divergence
from linspec.llm import LLM
from linspec.models.decoder import Decoder
from linspec.models.rope_scaling import with_rope_scaling
from linspec.policies import make_policy
from linspec.policies.costs import CostCurve, load_or_measure
from linspec.train.data import Sources, check_sources
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size
from linspec.verifiers import Verifier, make_verifier

PLAIN, PLAIN_AGAIN, ALL = "plain", "plain again", "all"


@dataclass(frozen=True, slots=True)
class DrafterRow:
    """One drafter on the prompts of one family, or of all.

    tokens_per_s: of decoding, prompts not counted. times_plain: seconds per token of plain decoding (the mean
    of its two runs) over those of the drafter; low and high: its 95% interval, by resampling prompts.
    whole_times_plain: the same with reading the prompts. tokens_per_round: accepted drafts plus the bonus
    token. acceptance[d]: share of the drafts at depth d + 1, behind an accepted parent, that were accepted
    too. drafting, verifying, rest: shares of the rounds' time. lossy: verifier or loop may change outputs.
    agreement: share of the tokens of plain greedy answers that came before the first difference; None where
    tokens are sampled. oracle: times plain of the best choice of a tree in each round by one who knows what
    is accepted, see `bench/oracle.py`; None for plain decoding and for several prompts at once.
    """

    drafter: str
    family: str
    prompts: int
    tokens: int
    tokens_per_s: float
    times_plain: float
    low: float
    high: float
    whole_times_plain: float
    tokens_per_round: float
    acceptance: tuple[float, ...]
    drafting: float
    verifying: float
    rest: float
    lossy: bool = False
    agreement: float | None = None
    oracle: float | None = None


@dataclass(frozen=True, slots=True)
class DrafterSpeeds:
    """A whole run: where, how, a row for each drafter and family, and those left out with the reason."""

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
    prompts: str | Path | None = None,
    per_family: int = 5,
    tokens: int = 64,
    temperature: float = 0.0,
    batch: int = 1,
    policy: str | int = "auto",
    verifier: str = "lossless",
    loops: Sequence[str] = (),
    data: Sources = ("stdlib",),
    quantize: int | None = None,
    kv: str = "auto",
    attention: str | None = None,
    rope_scaling: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> DrafterSpeeds:
    """Answer prompts with each drafter and without.

    Args:
        model: a model's name, directory or GGUF file.
        drafters: specs; where none are given, and no loops, every registered drafter that can be made for
            this model without being told more.
        prompts: a file of prompts, see `bench/prompts.py`; None takes pieces of held-out text of `data`.
        per_family: prompts of each family.
        tokens: most tokens of an answer, which also ends where the model ends it.
        temperature: 0 takes the likeliest token.
        batch: prompts that are answered at once.
        policy: 'auto', or a number of draft tokens for every round.
        verifier: of all drafters. The rows of a lossy one are marked.
        loops: specs of generation loops that decode without a drafter, such as 'first:DIR'. The rows of
            those that are registered as lossy are marked.
        attention, rope_scaling: of all of them, as of LLM.

    Raises:
        ConfigError: a size is out of its range, or nothing can draft.
        InputError: the prompts cannot be read.
        LinspecError: a drafter does not decode what plain decoding does, and the verifier is exact.
    """
    asked = {"per_family": per_family, "tokens": tokens, "batch": batch}
    for name, size in asked.items():
        check_size(name, size)
    data = check_sources(data)
    source, tokenizer = resolve(model), load_tokenizer(model)
    encoder = TextEncoder(tokenizer, len(tokenizer))
    texts = None if prompts is None else read_prompts(prompts, encoder, per_family)
    loaded = attending(
        with_rope_scaling(load_for(model, quantize, device=device), rope_scaling), attention, model
    )
    rule = make_verifier(verifier)
    context = DrafterContext(loaded, tokenizer, source, batch)
    made, skipped = ({}, []) if loops and not drafters else _make(drafters, context)
    common = {"tokenizer": tokenizer, "max_batch": batch, "kv_cache_dtype": kv}
    modes = _modes(loaded, made, loops, policy, rule, **common)
    if texts is None:
        texts = held_out_prompts(modes[0].llm, data, per_family, tokens)
    params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=seed)
    lossy = {mode.name for mode in modes if _is_lossy(mode, rule)}
    measured = _measure(modes, texts, params, batch, lossy)
    greedy = temperature == 0.0
    settings = {
        "model": str(model),
        "prompts": "held-out text" if prompts is None else str(prompts),
        **asked,
        "temperature": temperature,
        "policy": policy,
        "verifier": verifier,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "quantize": quantize,
        "kv_cache_dtype": modes[0].llm.kv_cache_dtype,
        "attention": attention,
        "rope_scaling": rope_scaling,
        "device": device,
    }
    curve = load_or_measure(loaded) if batch == 1 else None
    rows = tuple(_rows(measured, lossy, greedy, curve))
    return DrafterSpeeds(machine(), settings, rows, tuple(skipped))


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


def _modes(
    model: Decoder,
    drafters: Mapping[str, Drafter],
    loops: Sequence[str],
    policy: str | int,
    verifier: Verifier,
    **common: Any,
) -> list[Mode]:
    """Every drafter and loop, between plain decoding and plain decoding again; common: for all of them."""
    plain = LLM(model, **common)
    modes = [Mode(PLAIN, plain)]
    for name, drafter in drafters.items():
        watch = Watched(make_policy(policy, model))
        llm = LLM(model, drafter=drafter, policy=watch, verifier=verifier, **common)
        modes.append(Mode(name, llm, watch))
    modes += [Mode(f"loop {spec}", LLM(model, loop=spec, **common)) for spec in loops]
    return [*modes, Mode(PLAIN_AGAIN, plain)]


def _is_lossy(mode: Mode, verifier: Verifier) -> bool:
    """Whether a mode may decode something else than the model does."""
    exact = mode.watch is None or getattr(verifier, "lossless", False)
    return not (exact and mode.llm.engine.loop.lossless)


def _measure(
    modes: Sequence[Mode],
    texts: Sequence[BenchPrompt],
    params: SamplingParams,
    batch: int,
    lossy: Container[str],
) -> list[Measured]:
    """Every mode on every group of prompts of one family, in turns."""
    families = list(dict.fromkeys(text.family for text in texts))
    groups = []
    for family in families:
        mine = [text for text in texts if text.family == family]
        groups += [mine[i : i + batch] for i in range(0, len(mine), batch)]
    found = []
    with Progress("bench drafters", len(groups)) as progress:
        for mode in modes:
            run_of(mode, groups[0], params)
        for done, group in enumerate(groups):
            order = modes if done % 2 == 0 else modes[::-1]
            runs = {mode.name: run_of(mode, group, params) for mode in order}
            if params.temperature == 0.0:
                exact = {name: run for name, run in runs.items() if name not in lossy}
                _check_outputs(modes[0].llm, group, exact)
            found.append(Measured(group[0].family, runs))
            progress.update(done + 1, group[0].family)
    return found


def _check_outputs(llm: LLM, group: Sequence[BenchPrompt], runs: Mapping[str, Run]) -> None:
    """Refuse to time something that decodes something else."""
    for name, run in runs.items():
        for text, expected, got in zip(group, runs[PLAIN].outputs, run.outputs, strict=True):
            kv = llm.kv_cache_dtype
            found = (
                None if got == expected else divergence(llm.model, 0, text.ids, expected, got, kv)
            )
            if found is not None and not found.near_tie:
                raise LinspecError(
                    f"{name} does not decode what plain decoding does: new token {found.position} is "
                    f"{found.got} instead of {found.expected}, {found.logit_gap:.4f} below in logits. "
                    "Its speed means nothing; run linspec verify"
                )


def _rows(
    measured: Sequence[Measured], lossy: Container[str], greedy: bool, curve: CostCurve | None
) -> list[DrafterRow]:
    """All prompts first, then family by family."""
    families = dict.fromkeys(each.family for each in measured)
    names = list(measured[0].runs)
    parts = {ALL: list(measured)} | {
        family: [each for each in measured if each.family == family] for family in families
    }
    if len(families) == 1:
        del parts[ALL]
    return [
        _row(name, family, part, name in lossy, greedy, curve)
        for family, part in parts.items()
        for name in names
    ]


def _row(
    name: str,
    family: str,
    part: Sequence[Measured],
    lossy: bool,
    greedy: bool,
    curve: CostCurve | None,
) -> DrafterRow:
    runs = [each.runs[name] for each in part]
    plain = [(each.runs[PLAIN], each.runs[PLAIN_AGAIN]) for each in part]
    times, low, high = speed_up(runs, plain)
    whole, _, _ = speed_up(runs, plain, whole=True)
    tokens, seconds = sum(run.tokens for run in runs), sum(run.seconds for run in runs)
    shares = [sum(run.parts[i] for run in runs) for i in range(3)]
    drafting, verifying, rest = (round(share / (sum(shares) or 1.0), 4) for share in shares)
    rounds = sum(run.rounds for run in runs)
    judged = [each for run in runs for each in run.judged]
    return DrafterRow(
        drafter=name,
        family=family,
        prompts=sum(len(run.outputs) for run in runs),
        tokens=tokens,
        tokens_per_s=round(tokens / seconds, 2),
        times_plain=round(times, 3),
        low=round(low, 3),
        high=round(high, 3),
        whole_times_plain=round(whole, 3),
        tokens_per_round=round(1 + sum(run.accepted for run in runs) / max(1, rounds), 3),
        acceptance=_acceptance(runs),
        drafting=drafting,
        verifying=verifying,
        rest=rest,
        lossy=lossy,
        agreement=_agreement([each.runs[PLAIN] for each in part], runs) if greedy else None,
        oracle=round(oracle(judged, curve), 3) if judged and curve is not None else None,
    )


def _agreement(plain: Sequence[Run], runs: Sequence[Run]) -> float:
    """The share of the tokens of plain answers that come before the first difference."""
    same = total = 0
    for expected, got in zip(plain, runs, strict=True):
        for one, other in zip(expected.outputs, got.outputs, strict=True):
            pairs = zip(one, other, strict=False)
            same += len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            total += len(one)
    return round(same / max(1, total), 4)


def _acceptance(runs: Sequence[Run]) -> tuple[float, ...]:
    depths = range(max((len(run.tried) for run in runs), default=0))
    hits, tried = (
        [sum(each[d] for each in counts if d < len(each)) for d in depths]
        for counts in ([run.hits for run in runs], [run.tried for run in runs])
    )
    return tuple(round(hit / of, 4) for hit, of in zip(hits, tried, strict=True))
