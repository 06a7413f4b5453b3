"""How fast a model decodes at different contexts, plain and with drafters, in one run.

    result = bench("embedded-aug", [128, 2048, 8192], ["medusa"])
    for row in result.rows:
        print(row.context, row.mode, row.tokens_per_s)

Only decoding is timed: the context is read once and restored for every repeat. Modes take turns
within a repeat, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from linspec.bench.machine import machine
from linspec.checkpoints.attention import attending
from linspec.checkpoints.hub import load_tokenizer, resolve
from linspec.checkpoints.load_quantized import load_for
from linspec.decoding.outcome import raise_first
from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget
from linspec.drafters import DRAFTERS, Drafter, DrafterContext
from linspec.errors import ConfigError, InputError, LinspecError
from linspec.evaluate.lossless import divergence
from linspec.evaluate.perplexity import held_out_documents
from linspec.llm import LLM
from linspec.models.decoder import Decoder
from linspec.models.rope_scaling import with_rope_scaling
from linspec.policies.base import Policy
from linspec.state.slots import StateSnapshot
from linspec.train.data import Sources, check_sources, end_of_text
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_lengths, check_size

PLAIN = "plain"
# Characters per token of no tokenizer are so many that a context could not be filled from this.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One mode at one context.

    tokens_per_s and ms_per_token: from the median repeat, batch 1, one emitted token being one
    token. state_bytes: what the target remembers of the context. tokens_per_round: accepted drafts
    plus the bonus token, averaged over rounds; 1.0 is plain. spread: (slowest - fastest) / median
    of the repeats.
    """

    context: int
    mode: str
    tokens_per_s: float
    ms_per_token: float
    state_bytes: int
    tokens_per_round: float
    spread: float


@dataclass(frozen=True, slots=True)
class Speed:
    """A whole run: where, how, the rows, and the contexts that were left out with the reason."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[SpeedRow, ...]
    skipped: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A context that has been read, with the first new token; its state and last hidden state."""

    tokens: list[int]
    snapshot: list[StateSnapshot]
    hidden: dict[int, torch.Tensor]
    state_bytes: int


@dataclass(slots=True)
class _Run:
    """Repeats of one mode."""

    output: tuple[int, ...] = ()
    ms: list[float] = field(default_factory=list)
    tokens_per_round: float = 1.0


def bench(
    model: str | Path | Decoder,
    contexts: Sequence[int],
    drafters: Sequence[str] | Mapping[str, Drafter] = (),
    *,
    tokenizer: Any = None,
    tokens: int = 64,
    repeats: int = 5,
    policy: str | int | Policy = "auto",
    data: Sources = ("stdlib",),
    device: str = "cpu",
    bandwidth: bool = False,
    quantize: int | None = None,
    kv: str = "auto",
    attention: str | None = None,
    rope_scaling: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Decode `tokens` tokens after each of `contexts` (in tokens of held-out text) in every mode.

    Modes are plain decoding and each of `drafters`, specs or made ones by name; the first of
    `repeats` + 1 repeats warms up and is not counted. A context beyond the limit of a softmax model is
    skipped and named. Raises LinspecError when a drafter's output differs from plain decoding by more
    than a near tie.
    """
    _check(contexts, tokens, repeats)
    data = check_sources(data)
    source = None if isinstance(model, Decoder) else resolve(model)
    if not isinstance(model, Decoder):
        tokenizer = tokenizer or load_tokenizer(model)
        model = attending(
            with_rope_scaling(load_for(model, quantize, device=device), rope_scaling),
            attention,
            model,
        )
    else:
        model = attending(with_rope_scaling(model, rope_scaling), attention)
    modes = _modes(
        model, source, drafters, policy, tokenizer=tokenizer, max_batch=1, kv_cache_dtype=kv
    )
    limit = model.config.position_limit
    fitting = [c for c in contexts if limit is None or c + tokens <= limit]
    skipped = tuple(_skip(c, tokens, limit) for c in contexts if c not in fitting)
    text = _text(modes[PLAIN], held_out_documents(data), max(fitting, default=0))
    rows: list[SpeedRow] = []
    with Progress("bench", len(fitting) * (repeats + 1)) as progress:
        for at, context in enumerate(fitting):
            prefix = _read(modes[PLAIN], text[:context])
            runs = {mode: _Run() for mode in modes}
            for repeat in range(repeats + 1):
                for mode, llm in modes.items():
                    _decode(llm, prefix, tokens, runs[mode], clock, keep=repeat > 0)
                    _check_output(llm, mode, prefix, runs[PLAIN].output, runs[mode].output)
                progress.update(at * (repeats + 1) + repeat + 1, f"context {context}")
            rows += [_row(context, mode, prefix, run) for mode, run in runs.items()]
    settings = {
        "tokens": tokens,
        "repeats": repeats,
        "warm_up": 1,
        "batch": 1,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": quantize,
        # scripts read the old name
        "kv": modes[PLAIN].kv_cache_dtype,
        "kv_cache_dtype": modes[PLAIN].kv_cache_dtype,
        "attention": attention,
        "rope_scaling": rope_scaling,
        "device": device,
        "policy": policy if isinstance(policy, (str, int)) else policy.name,
    }
    return Speed(machine(bandwidth=bandwidth), settings, tuple(rows), skipped)


def _modes(
    model: Decoder,
    source: Path | None,
    drafters: Sequence[str] | Mapping[str, Drafter],
    policy: str | int | Policy,
    **common: Any,
) -> dict[str, LLM]:
    """Plain decoding, and decoding with each drafter; common: for all of them."""
    if not isinstance(drafters, Mapping):
        context = DrafterContext(model, common["tokenizer"], source)
        names = [name for name in dict.fromkeys(drafters) if name != "none"]
        drafters = {name: DRAFTERS.build(name, context) for name in names}
    modes = {PLAIN: LLM(model, **common)}
    for name, drafter in drafters.items():
        modes[name] = LLM(model, drafter=drafter, policy=policy, **common)
    return modes


def _check(contexts: Sequence[int], tokens: int, repeats: int) -> None:
    check_lengths("contexts", contexts)
    check_size("tokens", tokens)
    check_size("repeats", repeats)
    if tokens < 8 or repeats < 1:
        raise ConfigError(
            f"a timing needs 8 tokens and 1 repeat or more, got {tokens} and {repeats}"
        )


def _skip(context: int, tokens: int, limit: int | None) -> dict[str, Any]:
    reason = (
        f"{context} + {tokens} tokens exceed this model's {limit} positions; linearize it: linear "
        "mixers have no such limit"
    )
    return {"context": context, "reason": reason}


def _text(llm: LLM, documents: Sequence[str], length: int) -> list[int]:
    """`length` token ids of real text, repeated when the documents are too short."""
    ids: list[int] = []
    end = end_of_text(llm.tokenizer, llm.model.config)
    for document in documents:
        if len(ids) >= length:
            break
        part = document[: _CHARACTERS_PER_TOKEN * length]
        ids += [*llm.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], end]
    if not ids:
        raise InputError("there is no text to fill the context with")
    return (ids * (length // len(ids) + 1))[:length]


def _read(llm: LLM, prompt: Sequence[int]) -> _Prefix:
    """Process a prompt once and keep what follows from it."""
    engine = llm.engine
    engine.add(Request(tuple(prompt), SamplingParams(max_tokens=2, ignore_eos=True)))
    try:
        while not (emitted := engine.step()):
            pass
        raise_first(emitted)
        sequence = emitted[0].sequence
        return _Prefix(
            tokens=sequence.tokens[:],
            snapshot=engine.state.snapshot(sequence.slot),
            hidden=dict(sequence.hidden),
            state_bytes=engine.state.bytes(sequence.slot),
        )
    finally:
        engine.cancel()


def _decode(
    llm: LLM, prefix: _Prefix, tokens: int, run: _Run, clock: Callable[[], float], *, keep: bool
) -> None:
    """Decode once from `prefix` into `run`; drafters read the context before the clock starts."""
    engine = llm.engine
    params = SamplingParams(max_tokens=tokens + 1, ignore_eos=True)
    prompt = prefix.tokens[:-1]
    sampler = Sampler(params, prompt, llm.model.config.vocab_size)
    sampler.observe(prefix.tokens[-1:])
    row = RunningSequence(0, sampler, prefix.tokens[:], len(prompt), prefilled=len(prompt))
    row.hidden = dict(prefix.hidden)
    engine.scheduler.submit([row])
    try:
        # by hand: the engine itself would open an empty slot
        engine.scheduler.admit()
        engine.state.restore(row.slot, prefix.snapshot)
        if engine.drafter is not None:
            engine.drafter.started(row)
            engine.drafter.propose([row], [Budget.of(1)])
        began = clock()
        while engine.busy:
            raise_first(engine.step())
        _wait(llm)
        seconds = clock() - began
    finally:
        engine.cancel()
    run.output = tuple(row.tokens[len(prompt) :])
    run.tokens_per_round = row.stats.tokens_per_round
    if keep:
        run.ms.append(1000 * seconds / tokens)


def _wait(llm: LLM) -> None:
    if llm.model.device.type == "cuda":
        torch.cuda.synchronize()


def _check_output(
    llm: LLM, mode: str, prefix: _Prefix, plain: tuple[int, ...], got: tuple[int, ...]
) -> None:
    """Refuse to time something that decodes something else."""
    if got == plain:
        return
    found = divergence(llm.model, 0, prefix.tokens[:-1], plain, got, llm.kv_cache_dtype)
    if found is not None and not found.near_tie:
        raise LinspecError(
            f"{mode} does not decode what plain decoding does: new token {found.position} is "
            f"{found.got} instead of {found.expected}, {found.logit_gap:.4f} below in logits. Its "
            "speed means nothing; run linspec verify"
        )


def _row(context: int, mode: str, prefix: _Prefix, run: _Run) -> SpeedRow:
    median = statistics.median(run.ms)
    return SpeedRow(
        context=context,
        mode=mode,
        tokens_per_s=round(1000 / median, 2),
        ms_per_token=round(median, 4),
        state_bytes=prefix.state_bytes,
        tokens_per_round=round(run.tokens_per_round, 3),
        spread=round((max(run.ms) - min(run.ms)) / median, 3),
    )
