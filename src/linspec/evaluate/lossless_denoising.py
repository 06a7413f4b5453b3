"""Proof that policies of masked diffusion change nothing: the tokens of static decoding, greedy and sampled.

    report = verify_denoising("path/to/llada")
    assert report.lossless

Static decoding decides one token a forward and computes every block. Without a spec all combinations of
policies that say of themselves that they are lossless are held against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from linspec.checkpoints.hub import load_any_config, load_diffusion
from linspec.decoding.sampling import SamplingParams
from linspec.diffusion.kinds import kinds, lossless
from linspec.engine.loops import LOOPS
from linspec.engine.loops.masked_diffusion import DiffusionOptions
from linspec.errors import ConfigError
from linspec.evaluate.lossless import BATCH, sample_prompts
from linspec.evaluate.perplexity import held_out_documents
from linspec.llm import LLM
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.model_types import of_config
from linspec.train.data import Sources, check_sources
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size

LOOP = "masked-diffusion"
# what the other policies of these kinds are held against
REFERENCE = {"commit": "static", "stop": "never", "verify": "none"}
_TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token at which an output differs from that of static decoding.

    position: index among the new tokens. expected and got are None behind the end of an output.
    """

    loop: str
    temperature: float
    prompt: int
    position: int
    expected: int | None
    got: int | None


@dataclass(frozen=True, slots=True)
class DenoisingReport:
    """What `verify_denoising` found.

    lossless: no output differs, other than by rounding. loops: what was compared, and for each its forwards
    as a share of the reference's. near_ties: outputs that differ in float32 and are equal in float64, so that
    rounding decided.
    """

    lossless: bool
    prompts: int
    tokens: int
    loops: tuple[str, ...]
    forwards: tuple[float, ...]
    first_difference: Difference | None
    near_ties: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Run:
    outputs: list[tuple[int, ...]]
    forwards: int


def writes_by_masks(model: object) -> bool:
    """Whether a model, loaded or in a directory, is a masked-diffusion model."""
    if isinstance(model, str | Path):
        return of_config(load_any_config(model)).model is MaskedDiffusion
    return isinstance(model, MaskedDiffusion)


def verify_denoising(
    model: str | Path | MaskedDiffusion,
    loop: str | None = None,
    *,
    tokenizer: Any = None,
    prompts: int = 64,
    tokens: int = 128,
    data: Sources = ("stdlib",),
    device: str = "cpu",
    seed: int = 0,
    quantize: int | None = None,
    kv: str = "auto",
) -> DenoisingReport:
    """Compare decoding by a loop spec to static decoding, one by one and in ragged batches of 8.

    loop: 'masked-diffusion:…'; None compares every combination of lossless policies. Blocks and the cache
    are those of the spec in the reference too. Outputs are greedy, and drawn at temperature 1 with a seed
    each. Rounding is told from real differences where `model` is a directory and `quantize` is None. Raises
    what LLM raises, InputError when the data hold too little text.
    """
    check_size("prompts", prompts)
    check_size("tokens", tokens)
    data = check_sources(data)
    plans = [_options(loop)] if loop is not None else list(lossless_plans())
    make = partial(_llm, tokenizer=tokenizer, device=device, quantize=quantize, kv=kv)
    first = make(model, plans[0])
    texts = sample_prompts(first, held_out_documents(data), prompts, tokens, seed)
    again = partial(make, first.model, tokenizer=first.tokenizer, quantize=None)
    exact = None
    if isinstance(model, str | Path) and quantize is None:
        exact = partial(_exact, model, first.tokenizer, device)
    compared = _Compared(texts, tokens, exact)
    with Progress("verify: outputs compared", 2 * len(plans) * len(_TEMPERATURES)) as progress:
        for plan, heat in itertools.product(plans, _TEMPERATURES):
            compared.against(again, plan, heat)
            progress.update(compared.runs)
    return compared.report(prompts)


def lossless_plans() -> Iterator[DiffusionOptions]:
    """Every combination of lossless policies but the reference itself."""
    names = [kind for kind in kinds() if kind in REFERENCE]
    ways = [[REFERENCE[k], *(n for n in lossless(k) if n != REFERENCE[k])] for k in names]
    for chosen in itertools.product(*ways):
        found: dict[str, Any] = dict(zip(names, chosen, strict=True))
        if found != {kind: REFERENCE[kind] for kind in names}:
            yield DiffusionOptions(**found)


def reference_of(plan: DiffusionOptions) -> DiffusionOptions:
    """Static decoding with the blocks and the cache of a plan; a plan that is static keeps its order."""
    given: dict[str, Any] = {k: name for k, name in REFERENCE.items() if hasattr(plan, k)}
    if plan.commit.partition(":")[0] == REFERENCE["commit"]:
        del given["commit"]
    return replace(plan, **given)


def spec_of(plan: DiffusionOptions) -> str:
    """The spec of the loop, without what is the default."""
    usual = asdict(DiffusionOptions())
    changed = {name: value for name, value in asdict(plan).items() if value != usual[name]}
    settings = ",".join(f"{name}={value}" for name, value in changed.items())
    return f"{LOOP}:{settings}" if settings else LOOP


def _options(loop: str) -> DiffusionOptions:
    entry, options = LOOPS.read(loop)
    if not isinstance(options, DiffusionOptions):
        raise ConfigError(
            f"a diffusion model is verified with a loop such as {LOOP}:commit=static, got {entry.name!r}"
        )
    return options


def _llm(
    model: str | Path | MaskedDiffusion,
    plan: DiffusionOptions,
    *,
    tokenizer: Any,
    device: str = "cpu",
    quantize: int | None = None,
    kv: str = "auto",
    max_batch: int = BATCH,
) -> LLM:
    return LLM(
        model,
        tokenizer=tokenizer,
        loop=spec_of(plan),
        max_batch=max_batch,
        device=device,
        quantize=quantize,
        kv_cache_dtype=kv,
    )


def _exact(source: str | Path, tokenizer: Any, device: str, plan: DiffusionOptions) -> LLM:
    """The same in float64."""
    model = load_diffusion(source, dtype=torch.float64, device=device)
    return _llm(model, plan, tokenizer=tokenizer, max_batch=1, device=device)


class _Compared:
    """What comparisons have found so far."""

    def __init__(self, texts: Sequence[Sequence[int]], tokens: int, exact: Any) -> None:
        self.texts, self.tokens, self._exact = texts, tokens, exact
        self.runs = self.compared = self.near_ties = 0
        self.forwards: dict[str, list[float]] = {}
        self.first: Difference | None = None

    def against(self, make: Any, plan: DiffusionOptions, heat: float) -> None:
        """Hold a plan against its reference, alone and in batches."""
        expected = self._run(make(plan=reference_of(plan), max_batch=1), heat)
        for batch in (1, BATCH):
            got = self._run(make(plan=plan, max_batch=batch), heat)
            self._compare(plan, heat, expected, got)
            self.runs += 1
        share = got.forwards / max(1, expected.forwards)
        self.forwards.setdefault(spec_of(plan), []).append(share)

    def report(self, prompts: int) -> DenoisingReport:
        return DenoisingReport(
            lossless=self.first is None,
            prompts=prompts,
            tokens=self.compared,
            loops=tuple(self.forwards),
            forwards=tuple(sum(each) / len(each) for each in self.forwards.values()),
            first_difference=self.first,
            near_ties=self.near_ties,
        )

    def _run(self, llm: LLM, heat: float, only: int | None = None) -> _Run:
        chosen = range(len(self.texts)) if only is None else [only]
        params = [SamplingParams(max_tokens=self.tokens, temperature=heat, seed=i) for i in chosen]
        found = llm.generate([list(self.texts[i]) for i in chosen], params)
        return _Run([each.token_ids for each in found], sum(each.stats.rounds for each in found))

    def _compare(self, plan: DiffusionOptions, heat: float, expected: _Run, got: _Run) -> None:
        for prompt, pair in enumerate(zip(expected.outputs, got.outputs, strict=True)):
            places = enumerate(itertools.zip_longest(*pair))
            found = next(((at, *tokens) for at, tokens in places if tokens[0] != tokens[1]), None)
            self.compared += len(pair[0]) if found is None else found[0]
            if found is None:
                continue
            if self._only_rounding(plan, heat, prompt):
                self.near_ties += 1
            elif self.first is None:
                self.first = Difference(spec_of(plan), heat, prompt, *found)

    def _only_rounding(self, plan: DiffusionOptions, heat: float, prompt: int) -> bool:
        if self._exact is None:
            return False
        plans = (reference_of(plan), plan)
        first, second = (self._run(self._exact(each), heat, prompt).outputs for each in plans)
        return first == second
