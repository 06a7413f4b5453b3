"""Proof that a drafter changes nothing: greedy output by tokens, samples by a chi-square test.

report = verify("embedded-aug", "medusa")
assert report.lossless_greedy and report.sampling_p_value > 0.001
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from linspec.decoding.protocols import CausalModel
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.step import StepInput
from linspec.drafters.base import Drafter
from linspec.errors import ConfigError, InputError
from linspec.evaluate.perplexity import held_out_documents
from linspec.llm import LLM
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.native_linear import rounds_inputs
from linspec.policies.base import Policy
from linspec.train.data import Sources, check_sources
from linspec.utils.progress import Progress
from linspec.utils.sizes import check_size

# Below this difference of two logits, float32 rounding decides which of them is the larger.
NEAR_TIE = 1e-4
# Outcomes expected less often than this are counted together, as the chi-square test needs.
RARE = 5.0
# Prompts for the sampling test, and the tokens that follow them. The first token comes from the
# prompt's own step; the next two go through the verifier.
_SAMPLED_PROMPTS, _SAMPLED_TOKENS, _SAMPLED_TOP_K = 4, 3, 4
_SAMPLED_PROMPT_TOKENS = 32
_PROMPT_TOKENS = (16, 128)
BATCH = 8


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token at which two outputs of one prompt differ.

    prompt: its index; position: index among the new tokens. logit_gap: how far the worse of the two
    tokens lies below the model's best one (`_logits_behind`).
    """

    prompt: int
    position: int
    expected: int
    got: int
    logit_gap: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding alone can explain it."""
        return self.logit_gap < NEAR_TIE


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found.

    lossless_greedy: no output differs from plain decoding, other than from a near tie on: a place
    where the two best logits are less than 1e-4 apart, so that float32 rounding decides. near_ties
    counts those and `ties` lists them; behind one the rest of that output is not compared.
    first_divergence: the first difference that is not a near tie. tokens: how many were compared.
    sampling_p_value: probability of samples this far from the exact distribution, if they follow
    it; None when no sampling was tested. tokens_per_round: of the greedy runs with the drafter.
    """

    lossless_greedy: bool
    prompts: int
    tokens: int
    sampling_p_value: float | None
    first_divergence: Divergence | None
    near_ties: int
    ties: tuple[Divergence, ...]
    tokens_per_round: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def verify(
    model: str | Path | CausalModel,
    drafter: str | Drafter = "none",
    *,
    tokenizer: Any = None,
    prompts: int = 64,
    tokens: int = 128,
    draws: int = 2000,
    policy: str | int | Policy = 12,
    data: Sources = ("stdlib",),
    device: str = "cpu",
    seed: int = 0,
    quantize: int | None = None,
    kv: str = "auto",
    attention: str | None = None,
) -> Report:
    """Compare decoding with `drafter` to plain decoding, at batch 1 and in ragged batches of 8.

    prompts: pieces of held-out text of different lengths, each continued by `tokens` tokens.
    policy: a fixed number of draft nodes, so that drafts are verified even where they do not pay.
    draws: samples at temperature 1 for the test of the distribution, 0 leaves it out.
    attention: as of LLM; drafts must then change nothing of what this attention gives. Raises what
    LLM raises, InputError when the data hold too little text.
    """
    check_size("prompts", prompts)
    check_size("tokens", tokens)
    check_size("draws", draws, least=0)
    data = check_sources(data)
    fast = LLM(
        model,
        tokenizer=tokenizer,
        drafter=drafter,
        policy=policy,
        max_batch=BATCH,
        device=device,
        quantize=quantize,
        kv_cache_dtype=kv,
        attention=attention,
    )
    _check_causal(fast.model)
    texts = sample_prompts(fast, held_out_documents(data), prompts, tokens, seed)
    alone = partial(LLM, fast.model, tokenizer=fast.tokenizer, max_batch=1, kv_cache_dtype=kv)
    plain, single = alone(), alone(drafter=_only(fast), policy=policy)
    with Progress("verify: prompts decoded", 3 * prompts) as progress:
        expected, _ = _greedy(plain, texts, tokens, progress, 0)
        one_by_one, tau = _greedy(single, texts, tokens, progress, prompts)
        ragged, _ = _greedy(fast, texts, tokens, progress, 2 * prompts)
    compared, found = _compare(fast, texts, expected, (one_by_one, ragged))
    ties = tuple(d for d in found if d.near_tie)
    real = [d for d in found if not d.near_tie]
    return Report(
        lossless_greedy=not real,
        prompts=prompts,
        tokens=compared,
        sampling_p_value=sampling_p_value(fast, texts, draws) if draws else None,
        first_divergence=real[0] if real else None,
        near_ties=len(ties),
        ties=ties,
        tokens_per_round=tau,
    )


def _check_causal(model: object) -> None:
    if isinstance(model, MaskedDiffusion):
        raise ConfigError(
            "a masked-diffusion model has no next token to draft; `verify_denoising` holds its policies "
            "against static decoding"
        )


def _only(llm: LLM) -> str | Drafter:
    """The drafter of `llm`, to be used again: runs follow one another and share nothing else."""
    return llm.engine.drafter or "none"


def sample_prompts(
    llm: LLM, documents: Sequence[str], count: int, new: int, seed: int
) -> list[list[int]]:
    """`count` pieces of token ids of different lengths, with room for `new` more tokens."""
    limit = llm.model.config.position_limit
    shortest, longest = _PROMPT_TOKENS
    if limit is not None:
        longest = min(longest, limit + 1 - new)
        shortest = min(shortest, longest)
    if shortest < 1:
        raise ConfigError(
            f"{new} new tokens do not fit this model's {limit} positions behind a prompt; "
            "ask for fewer tokens"
        )
    rng = random.Random(seed)
    order = rng.sample(range(len(documents)), len(documents))
    found: list[list[int]] = []
    for place in range(count):
        text = documents[order[place % len(order)]]
        # characters before tokens: a whole file need not be tokenized for a few dozen
        begin = rng.randrange(max(1, len(text) - 8 * longest))
        ids = llm.tokenizer(text[begin : begin + 16 * longest], add_special_tokens=False)
        piece = ids["input_ids"][: rng.randint(shortest, longest)]
        if not piece:
            raise InputError("the data hold an empty document; give longer text")
        found.append(list(piece))
    return found


def _greedy(
    llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, progress: Progress, done: int
) -> tuple[list[tuple[int, ...]], float]:
    """Outputs in the order of the prompts, and tokens per round over all of them."""
    outputs: dict[int, tuple[int, ...]] = {}
    rounds = accepted = 0
    for piece in llm.stream(list(prompts), SamplingParams(max_tokens=tokens, ignore_eos=True)):
        if piece.done is not None:
            outputs[piece.index] = piece.done.token_ids
            rounds += piece.done.stats.rounds
            accepted += piece.done.stats.accepted
            progress.update(done + len(outputs))
    return [outputs[i] for i in range(len(prompts))], 1 + accepted / rounds if rounds else 1.0


def _compare(
    llm: LLM,
    texts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    runs: Sequence[Sequence[Sequence[int]]],
) -> tuple[int, list[Divergence]]:
    """How many tokens of `runs` were compared, and where outputs first differ from `expected`."""
    compared, found = 0, []
    for outputs in runs:
        for i, text in enumerate(texts):
            different = divergence(llm.model, i, text, expected[i], outputs[i], llm.kv_cache_dtype)
            compared += different.position if different else len(expected[i])
            found += [different] if different else []
    return compared, found


@torch.inference_mode()
def divergence(
    model: CausalModel,
    prompt: int,
    text: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    kv: str = "float",
) -> Divergence | None:
    """Where `got` first differs from `expected`, both behind the token ids `text`; kv: the kind of cache."""
    length = min(len(expected), len(got))
    place = next((i for i in range(length) if expected[i] != got[i]), None)
    if place is None:
        if len(expected) == len(got):
            return None
        longer = expected if len(expected) > length else got
        pair = [longer[length] if longer is each else -1 for each in (expected, got)]
        return Divergence(prompt, length, pair[0], pair[1], math.inf)
    logits = _logits_behind(model, text, [expected[:place]], kv)[0].double()
    worse = min(float(logits[expected[place]]), float(logits[got[place]]))
    return Divergence(prompt, place, expected[place], got[place], float(logits.max()) - worse)


def sampling_p_value(llm: LLM, prompts: Sequence[Sequence[int]], draws: int) -> float:
    """Chi-square goodness of fit of sampled continuations against their exact distribution.

    A continuation is three tokens at temperature 1 among the four likeliest each: 64 outcomes,
    whose probabilities are computed by the model's full form, or by its step where inputs or keys are
    rounded. The statistics of several prompts add up.
    """
    statistic, freedom = 0.0, 0
    chosen = [tuple(p[:_SAMPLED_PROMPT_TOKENS]) for p in prompts[:_SAMPLED_PROMPTS]]
    each = max(1, draws // len(chosen))
    with Progress("verify: samples drawn", each * len(chosen)) as progress:
        for i, prompt in enumerate(chosen):
            exact = _exact_outcomes(llm.model, prompt, llm.kv_cache_dtype)
            counts: Counter[tuple[int, ...]] = Counter()
            params = [_sampled(seed=i * each + draw) for draw in range(each)]
            for piece in llm.stream([list(prompt)] * each, params):
                if piece.done is not None:
                    counts[piece.done.token_ids] += 1
                    progress.update(i * each + counts.total())
            if any(outcome not in exact for outcome in counts):
                return 0.0
            more, bins = chi_square(counts, exact)
            statistic += more
            freedom += bins - 1
    return survival(statistic, freedom)


def _sampled(seed: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=_SAMPLED_TOKENS,
        temperature=1.0,
        top_k=_SAMPLED_TOP_K,
        seed=seed,
        ignore_eos=True,
    )


@torch.inference_mode()
def _exact_outcomes(
    model: CausalModel, prompt: Sequence[int], kv: str
) -> dict[tuple[int, ...], float]:
    """Probability of every possible continuation of `prompt`, token by token."""
    sampler = Sampler(_sampled(seed=0), prompt, model.config.vocab_size)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(_SAMPLED_TOKENS):
        texts = list(found)
        logits = _logits_behind(model, prompt, texts, kv)
        longer: dict[tuple[int, ...], float] = {}
        for text, row in zip(texts, logits, strict=True):
            distribution = sampler.probabilities(row).double()
            for token in distribution.nonzero().flatten().tolist():
                longer[(*text, token)] = found[text] * float(distribution[token])
        found = longer
    return found


def _logits_behind(
    model: CausalModel, prompt: Sequence[int], texts: Sequence[Sequence[int]], kv: str
) -> torch.Tensor:
    """Logits [B, vocab] behind `prompt` and each of B texts.

    By the full form, which shares no code with the step. Not where inputs are rounded to integers or keys to
    16 bits: a sum in another order flips some of these, layer by layer more, until two correct forms differ
    by as much as rounding costs.
    """
    if kv == "float" and not rounds_inputs(model):
        return model.full_logits(prompt, texts)
    rows = []
    for text in texts:
        state = model.new_state(1, kv)
        fed, _ = model.open([*prompt, *text], 0, state)
        rows.append(model.step([StepInput(0, fed, all_logits=False)], state).logits[-1:])
    return torch.cat(rows)


def chi_square(
    counts: Mapping[tuple[int, ...], int], exact: Mapping[tuple[int, ...], float]
) -> tuple[float, int]:
    """Pearson's statistic and its number of bins; rare outcomes share bins."""
    total = sum(counts.values())
    statistic, bins = 0.0, 0
    expected = observed = 0.0
    # likeliest first: rare outcomes gather until they are expected often enough, and what is left
    # over joins the last bin
    ranked = sorted(exact, key=lambda outcome: exact[outcome], reverse=True)
    left = total * sum(exact.values())
    for outcome in ranked:
        expected += total * exact[outcome]
        observed += counts.get(outcome, 0)
        left -= total * exact[outcome]
        if expected >= RARE and (left >= RARE or outcome == ranked[-1]):
            statistic += (observed - expected) ** 2 / expected
            bins += 1
            expected = observed = 0.0
    if expected > 0:
        statistic += (observed - expected) ** 2 / expected
        bins += 1
    return statistic, bins


def survival(statistic: float, freedom: int) -> float:
    """P(chi-square with `freedom` degrees of freedom exceeds `statistic`)."""
    if freedom < 1:
        return 1.0
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))
