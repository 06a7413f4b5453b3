"""Every setting of a request: what it does, by plain formulas; drafts and company change nothing."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import model_dir, tiny_tokenizer
from helpers import VOCAB, full_logits, random_tokens, randomise, tiny_model
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from linspec.decoding.outcome import raise_first
from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import TokenTree, from_paths
from linspec.drafters.aded import Aded
from linspec.drafters.base import Drafter
from linspec.drafters.draft_model import DraftModel
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.lookup import LookupOptions, PromptLookup
from linspec.drafters.medusa import Medusa
from linspec.drafters.mixed import Mixed
from linspec.drafters.suffix import Suffix
from linspec.engine.engine import Engine
from linspec.errors import ConfigError, InputError, NotFinite, WrongType
from linspec.llm import LLM
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.verifiers import GreedyVerifier, LosslessVerifier

SLOTS = 3


def no_repeats(output: list[int], scores: Tensor) -> Tensor:
    """No token that leaves the same rest as the last one."""
    if output:
        scores[output[-1] % 3 :: 3] = -math.inf
    return scores


def odd_after_even(prompt: list[int], output: list[int], scores: Tensor) -> Tensor:
    """Even tokens are followed by odd ones."""
    if [*prompt, *output][-1] % 2 == 0:
        scores[::2] -= 3
    return scores


def short_words() -> tuple[tuple[int, ...], ...]:
    return (*(((a, b)) for a in range(0, VOCAB, 2) for b in range(0, VOCAB, 3)), (5,), (1, 2, 3))


SETTINGS: dict[str, dict[str, Any]] = {
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2, "presence_penalty": -0.3},
    "repetition": {"repetition_penalty": 1.6},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": tuple(range(0, VOCAB, 2))},
    "stop_token_ids": {"stop_token_ids": tuple(range(0, VOCAB, 5))},
    "allowed": {"allowed_token_ids": tuple(range(3, VOCAB, 2))},
    "bad_words": {"bad_words": short_words()},
    "processor": {"logits_processors": (no_repeats,)},
    "processor of the prompt": {"logits_processors": (odd_after_even,)},
    "processor of transformers": {"logits_processors": (SuppressTokensLogitsProcessor([2, 4, 8]),)},
    "all": {
        "min_p": 0.05,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "min_tokens": 4,
        "stop_token_ids": (6,),
        "allowed_token_ids": tuple(range(1, VOCAB)),
        "bad_words": ((5,), (7, 8)),
        "logit_bias": {3: 1.0},
        "logits_processors": (odd_after_even,),
    },
}
LENGTHS = (3, 10, 6)
PROMPTS = [random_tokens(2, 1), random_tokens(7, 2), random_tokens(6, 3) * 3]


@cache
def model() -> Decoder:
    return unprepared().to_inference()


def unprepared() -> Decoder:
    return tiny_model("aug", seed=4, dtype=torch.float32)


@cache
def other() -> Decoder:
    return tiny_model("softmax", seed=9, dtype=torch.float32).to_inference()


def heads() -> Medusa:
    config = HeadsConfig(width=model().config.width, vocab_size=VOCAB, heads=3)
    made = MedusaHeads(config, unprepared(), [[0.5, 0.3, 0.2], [0.4, 0.2], [0.3]])
    return Medusa(randomise(made, 5))


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "lookup": lambda: PromptLookup(options=LookupOptions(min_ngram=1)),
    "medusa": heads,
    # the model itself: most of its drafts come true
    "draft-model": lambda: DraftModel(model(), model().config, SLOTS),
    "other-draft-model": lambda: DraftModel(other(), model().config, SLOTS),
    "suffix": Suffix,
    "aded": Aded,
    "mix": lambda: Mixed([Suffix(), heads()]),
}


def decode(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    drafter: Drafter | None = None,
    *,
    prefill_tokens: int = 512,
) -> list[RunningSequence]:
    """The finished rows, which share the steps of one engine."""
    engine = Engine(
        model(),
        verifier=LosslessVerifier(),
        drafter=drafter,
        policy=Fixed(6),
        slots=SLOTS,
        prefill_tokens=prefill_tokens,
    )
    asked = [engine.add(Request(tuple(p), each)) for p, each in zip(prompts, params, strict=True)]
    done: dict[int, RunningSequence] = {}
    while engine.busy:
        emitted = engine.step()
        raise_first(emitted)
        done |= {item.sequence.request: item.sequence for item in emitted if item.finished}
    return [done[request] for request in asked]


def outputs(rows: Sequence[RunningSequence]) -> list[list[int]]:
    return [row.tokens[row.prompt_length :] for row in rows]


def requests(setting: str, temperature: float) -> list[SamplingParams]:
    return [
        SamplingParams(
            temperature=temperature,
            seed=i,
            **({"max_tokens": max(n, SETTINGS[setting].get("min_tokens", 0))} | SETTINGS[setting]),
        )
        for i, n in enumerate(LENGTHS)
    ]


@cache
def plain(setting: str, temperature: float) -> list[list[int]]:
    """One request after the other, without drafts."""
    params = requests(setting, temperature)
    return [outputs(decode([p], [each]))[0] for p, each in zip(PROMPTS, params, strict=True)]


@pytest.mark.crossed(3)
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_do_not_depend_on_drafts_or_company(setting: str, temperature: float) -> None:
    params = requests(setting, temperature)
    expected = plain(setting, temperature)
    assert outputs(decode(PROMPTS, params)) == expected
    for name, make in DRAFTERS.items():
        # sampled drafts keep the distribution, not the tokens
        if temperature and "draft-model" in name:
            continue
        assert outputs(decode(PROMPTS, params, make())) == expected, name
        if name in ("lookup", "draft-model"):
            assert outputs(decode(PROMPTS[2:], params[2:], make())) == expected[2:], name


@pytest.mark.parametrize("setting", SETTINGS)
def test_sampled_drafts_do_not_depend_on_company(setting: str) -> None:
    params = requests(setting, 0.9)
    make = DRAFTERS["draft-model"]
    together = outputs(decode(PROMPTS, params, make()))
    assert outputs(decode(PROMPTS[1:2], params[1:2], make())) == together[1:2]


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "min_p"])
def test_greedy_settings_change_something(setting: str) -> None:
    free = [SamplingParams(max_tokens=n) for n in LENGTHS]
    assert plain(setting, 0.0) != outputs(decode(PROMPTS, free))


def test_drafts_come_true_under_every_setting() -> None:
    for setting in SETTINGS:
        rows = decode(PROMPTS, requests(setting, 0.0), DRAFTERS["draft-model"]())
        assert sum(row.stats.accepted for row in rows) > 5, setting


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_node_of_a_tree_is_judged_by_its_own_path(setting: str) -> None:
    """Greedy walks of a wide tree against plain decoding, with the history written out."""
    params = requests(setting, 0.0)[1]
    sampler = Sampler(params, PROMPTS[1], VOCAB)
    first = [3, 9, 3]
    sampler.observe(first)
    paths = [[a, b] for a in range(6) for b in range(6)]
    tree = from_paths(3, paths)
    before = [*PROMPTS[1], *first]
    texts = [[*before, *[tree.tokens[n] for n in tree.path_to(i)[1:]]] for i in range(len(tree))]
    logits = full_logits(model(), texts)
    for node, text in enumerate(texts):
        fresh = Sampler(params, PROMPTS[1], VOCAB)
        fresh.observe(text[len(PROMPTS[1]) :])
        drafts = [tree.tokens[n] for n in tree.path_to(node)[1:]]
        assert torch.equal(sampler.scores(logits[node], drafts), fresh.scores(logits[node]))
    path = GreedyVerifier().accept(tree, logits, sampler).path
    for parent, child in pairwise(path):
        fresh = Sampler(params, PROMPTS[1], VOCAB)
        fresh.observe(texts[parent][len(PROMPTS[1]) :])
        assert int(fresh.scores(logits[parent]).argmax()) == tree.tokens[child]


# ---- by plain formulas


def test_presence_and_frequency_count_the_output_alone() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(params, [0, 0, 1], 5)
    sampler.observe([1, 2])
    found = sampler.scores(torch.zeros(5), [2, 3])
    # once, twice, once; the prompt's zeros do not count
    assert found.tolist() == [0.0, -0.75, -1.0, -0.75, 0.0]
    assert sampler.scores(torch.zeros(5)).tolist() == [0.0, -0.75, -0.75, 0.0, 0.0]


def test_bad_words_are_those_of_transformers() -> None:
    words = [[3], [1, 2], [1, 1, 4], [2, 0, 2]]
    theirs = NoBadWordsLogitsProcessor(words)
    for seed in range(40):
        # of fewer tokens than a word some versions of theirs compare nothing
        history = [token % 5 for token in random_tokens(3 + seed % 6, seed)]
        cut = seed % len(history)
        sampler = Sampler(SamplingParams(bad_words=words), history[:cut], 5)
        sampler.observe(history[cut:-1])
        expected = theirs(torch.tensor([history]), torch.zeros(1, 5))[0]
        assert torch.equal(sampler.scores(torch.zeros(5), history[-1:]), expected)
    short = Sampler(SamplingParams(bad_words=words), [1], 5)
    assert short.scores(torch.zeros(5), [1]).isinf().tolist() == [False, False, True, True, True]


def test_min_tokens_ban_what_ends_an_output_until_then() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=[1])
    sampler = Sampler(params, [1, 1, 1, 1], 4, eos_ids=(3,))
    bans = [0.0, -math.inf, 0.0, -math.inf]
    assert sampler.scores(torch.zeros(4)).tolist() == bans
    sampler.observe([0])
    assert sampler.scores(torch.zeros(4), [0]).tolist() == bans
    assert sampler.scores(torch.zeros(4), [0, 0]).tolist() == [0.0] * 4
    ignoring = Sampler(SamplingParams(min_tokens=3, ignore_eos=True), [1], 4, eos_ids=(3,))
    assert ignoring.plain


def test_allowed_tokens_alone_are_kept_and_no_bias_lifts_a_ban() -> None:
    params = SamplingParams(
        allowed_token_ids=[0, 2], bad_words=[[2]], logit_bias={1: 99.0, 2: 99.0}
    )
    assert Sampler(params, [0], 3).scores(torch.zeros(3)).tolist() == [0.0, -math.inf, -math.inf]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_is_that_of_transformers(p: float) -> None:
    for seed in range(20):
        logits = 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
        sampler = Sampler(SamplingParams(temperature=0.7, min_p=p), (), 40)
        expected = MinPLogitsWarper(p)(torch.empty(1, 0), logits[None] / 0.7)[0].softmax(-1)
        torch.testing.assert_close(sampler.probabilities(logits), expected)


def test_draws_follow_min_p() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(SamplingParams(temperature=1.0, min_p=0.25, seed=8), (), 4)
    drawn = torch.tensor([sampler.draw(sampler.probabilities(p.log())) for _ in range(5000)])
    kept = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    expected = kept[:3] * 5000
    counts = drawn.bincount(minlength=4)
    assert counts[3] == 0
    # chi-square with 2 degrees of freedom: 1 in 1000 above 13.8
    assert float(((counts[:3] - expected) ** 2 / expected).sum()) < 13.8


def test_speculation_under_rules_of_the_history_keeps_the_distribution() -> None:
    """Pairs of tokens, the first drafted from another distribution, against their exact probabilities."""
    noise = torch.Generator().manual_seed(3)
    first, after = torch.randn(5, generator=noise) / 2, torch.randn(5, 5, generator=noise) / 2
    proposal = torch.randn(5, generator=noise).softmax(-1)
    rules: dict[str, Any] = {
        "presence_penalty": 1.0,
        "bad_words": [[1, 2], [0, 0]],
        "logits_processors": [odd_after_even],
        "min_p": 0.02,
    }

    def start(seed: int) -> Sampler:
        return Sampler(SamplingParams(temperature=1.0, seed=seed, **rules), [0], 5)

    counts = torch.zeros(5, 5, dtype=torch.float64)
    drafts = torch.multinomial(proposal, 3000, replacement=True, generator=noise).tolist()
    for seed, draft in enumerate(drafts):
        sampler, tree = start(seed), TokenTree((0, draft), (-1, 0), {0: proposal})
        judged = LosslessVerifier().accept(tree, torch.stack((first, after[draft])), sampler)
        tokens = judged.emitted(tree)
        if len(tokens) == 1:
            drawn = sampler.draw(sampler.probabilities(after[tokens[0]], tokens))
            tokens = (*tokens, drawn)
        counts[tokens] += 1
    law = start(0).probabilities(first).double()
    rows = [start(0).probabilities(after[token], [token]).double() for token in range(5)]
    expected = 3000 * law[:, None] * torch.stack(rows)
    assert not counts[expected == 0].any()
    many = expected >= 5
    statistic = float(((counts - expected)[many] ** 2 / expected[many]).sum())
    freedom = int(many.sum())
    # more than four deviations above the mean of a chi-square
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    assert freedom >= 10


# ---- processors


def test_a_processor_may_write_into_what_it_is_given() -> None:
    def greedy_hands(output: list[int], scores: Tensor) -> Tensor:
        output.append(7)
        scores[1] = 9.0
        return scores

    sampler = Sampler(SamplingParams(logits_processors=[greedy_hands]), [0], 3)
    logits = torch.zeros(3)
    assert sampler.scores(logits).tolist() == [0.0, 9.0, 0.0] == sampler.scores(logits).tolist()
    assert logits.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, WrongType),
        (torch.zeros(2), WrongType),
        (torch.zeros(3, dtype=torch.int64), WrongType),
        (torch.ones(3, dtype=torch.bool), WrongType),
        (torch.full((3,), math.nan), InputError),
        (torch.full((3,), math.inf), InputError),
        (torch.full((3,), -math.inf), InputError),
    ],
)
def test_what_a_processor_must_not_return_is_named(answer: Any, error: type[Exception]) -> None:
    sampler = Sampler(SamplingParams(logits_processors=[lambda output, scores: answer]), [0], 3)
    with pytest.raises(error, match="logits.processor"):
        sampler.scores(torch.zeros(3))


def test_a_dead_end_that_only_drafts_reach_does_not_end_the_request() -> None:
    """A draft model asks about tokens that never come."""
    true = outputs(decode(PROMPTS[1:2], [SamplingParams(max_tokens=14)]))[0]

    def fragile(output: list[int], scores: Tensor) -> Tensor:
        if output != true[: len(output)]:
            raise RuntimeError("not here")
        return scores

    params = SamplingParams(max_tokens=14, logits_processors=[fragile])
    rows = decode(PROMPTS[1:2], [params], DRAFTERS["other-draft-model"]())
    assert outputs(rows) == [true]
    assert rows[0].stats.drafted


def test_a_processor_that_fails_ends_its_request_alone() -> None:
    def broken(output: list[int], scores: Tensor) -> Tensor:
        if len(output) == 2:
            raise RuntimeError("broken")
        return scores

    llm = LLM(model_dir("aug"), max_batch=3)
    params = [SamplingParams(max_tokens=6) for _ in range(3)]
    expected = llm.generate(["ab", "cd", "ef"], params)
    params[1] = SamplingParams(max_tokens=6, logits_processors=[broken])
    found = llm.generate(["ab", "cd", "ef"], params, return_errors=True)
    assert str(found[1].error) == "broken" and len(found[1].token_ids) == 2
    assert [found[i].token_ids for i in (0, 2)] == [expected[i].token_ids for i in (0, 2)]


# ---- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("n", value) for value in (0, -1, 1.5, True, 10**6)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan, "0.1")),
        *(
            (name, value)
            for name in ("presence_penalty", "frequency_penalty")
            for value in (-2.1, 2.1, math.nan, "1")
        ),
        *(("min_tokens", value) for value in (-1, 129, 0.5)),
        *(
            (name, value)
            for name in ("stop_token_ids", "allowed_token_ids")
            for value in ([-1], ["a"], [1.5], [True], "12", 5)
        ),
        ("allowed_token_ids", []),
        *(("bad_words", value) for value in ("word", [""], [[]], [[-1]], [5], 5)),
        *(("prompt_logprobs", value) for value in (-1, "1")),
        *(("logits_processors", value) for value in ([5], "f", no_repeats)),
        *(
            (name, "yes")
            for name in ("skip_special_tokens", "include_stop_str_in_output", "ignore_eos")
        ),
    ],
)
def test_a_broken_rule_of_a_new_setting_is_named(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        SamplingParams(**{setting: value, "temperature": 1.0})  # type: ignore[arg-type]


def test_several_greedy_sequences_are_refused() -> None:
    with pytest.raises(ConfigError, match="all sequences would be the same"):
        SamplingParams(n=2)


@pytest.mark.parametrize(
    "settings",
    [{"stop_token_ids": [VOCAB]}, {"allowed_token_ids": [VOCAB]}, {"bad_words": [[1, VOCAB]]}],
)
def test_ids_of_a_setting_outside_the_vocabulary_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(settings))} names token {VOCAB}"):
        Sampler(SamplingParams(**settings), [0], VOCAB)


def test_a_sampler_is_of_one_sequence() -> None:
    with pytest.raises(ConfigError, match=r"n = 2.*sequences"):
        Sampler(SamplingParams(n=2, temperature=1.0), [0], VOCAB)


def test_a_bad_word_of_text_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="use LLM"):
        Sampler(SamplingParams(bad_words=["end"]), [0], VOCAB)


def test_new_settings_are_values() -> None:
    params = SamplingParams(stop_token_ids=[1], bad_words=["a", [1, 2]], allowed_token_ids=[3])
    assert params == pickle.loads(pickle.dumps(params))
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))


def test_bans_that_leave_nothing_are_named() -> None:
    params = SamplingParams(allowed_token_ids=[1], bad_words=[[1]])
    with pytest.raises(InputError, match="nothing is allowed: allowed_token_ids and bad_words"):
        Sampler(params, [0], 3).scores(torch.zeros(3))


# ---- sequences and prompts


def test_sequences_have_their_own_seeds_and_the_first_is_the_request() -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=5, prompt_logprobs=0)
    first, *others = params.sequences()
    assert first == SamplingParams(temperature=1.0, seed=5, prompt_logprobs=0)
    assert len({each.seed for each in (first, *others)}) == 4
    assert params.sequences() == params.sequences()
    assert all(each.n == 1 and each.prompt_logprobs is None for each in others)
    fresh = SamplingParams(n=3, temperature=1.0).sequences()
    assert [each.seed for each in fresh] == [None] * 3


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_n_sequences_do_not_depend_on_slots_or_drafts(drafter: str) -> None:
    params = [
        SamplingParams(n=3, max_tokens=9, temperature=1.0, seed=2, logprobs=0),
        SamplingParams(max_tokens=5),
        SamplingParams(n=2, max_tokens=7, temperature=0.8, seed=2),
    ]
    found = LLM(model_dir("aug"), drafter=drafter, policy=4, max_batch=2).generate(
        ["ab cd", "end", "the end"], params
    )
    assert [len(each.outputs) for each in found] == [3, 1, 2]
    alone = LLM(model_dir("aug"), max_batch=1)
    for prompt, each, result in zip(["ab cd", "end", "the end"], params, found, strict=True):
        singles = [alone.generate(prompt, one)[0] for one in each.sequences()]
        assert [o.token_ids for o in result.outputs] == [s.token_ids for s in singles]
        assert result.token_ids == result.outputs[0].token_ids
    assert len({each.token_ids for each in found[0].outputs}) == 3
    assert len(found[0].to_json()["outputs"]) == 3 and "outputs" not in found[1].to_json()


@pytest.mark.parametrize("chunk", [1, 5, 64, 512])
def test_prompt_logprobs_are_those_of_the_full_form(chunk: int) -> None:
    prompts = [random_tokens(1, 8), random_tokens(90, 9), random_tokens(13, 10)]
    params = [SamplingParams(max_tokens=2, prompt_logprobs=2) for _ in prompts]
    rows = decode(prompts, params, prefill_tokens=chunk)
    for prompt, row in zip(prompts, rows, strict=True):
        assert len(row.prompt_logprobs) == len(prompt) and row.prompt_logprobs[0] is None
        with torch.no_grad():
            laws = model()(torch.tensor([prompt]))[0].float().log_softmax(-1)
        for place, entry in enumerate(row.prompt_logprobs[1:], 1):
            assert entry is not None and entry.token == prompt[place]
            assert entry.logprob == pytest.approx(float(laws[place - 1, prompt[place]]), abs=1e-4)
            assert entry.top[0][1] == pytest.approx(float(laws[place - 1].max()), abs=1e-4)
    free = decode(prompts, [SamplingParams(max_tokens=2)] * 3)
    assert outputs(rows) == outputs(free) and free[1].prompt_logprobs == []


def test_prompt_logprobs_reach_the_caller() -> None:
    llm = LLM(model_dir("softmax"))
    params = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=3, prompt_logprobs=1)
    result = llm.generate("ab cd end", params)[0]
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == result.prompt_tokens
    assert result.to_json()["prompt_logprobs"][0] is None
    assert result.others[0].prompt_logprobs is None


# ---- text


def test_bad_words_of_text_are_never_completed() -> None:
    llm = LLM(model_dir("aug"), drafter="prompt-lookup", policy=4)
    free = llm.generate("ab cd", SamplingParams(max_tokens=40, ignore_eos=True))[0]
    words = [free.text[i : i + 2] for i in range(3, 12) if free.text[i : i + 2].isascii()]
    words = [word for word in words if word.strip()]
    assert words
    params = SamplingParams(max_tokens=40, ignore_eos=True, bad_words=words)
    spelled = llm.encoder.spelled(words)
    tokens = llm.generate("ab cd", params)[0].token_ids
    assert tokens != free.token_ids
    for word in spelled:
        places = range(len(tokens) - len(word) + 1)
        assert not any(tokens[i : i + len(word)] == word for i in places)


def test_stop_tokens_end_the_text_before_them_or_behind_them() -> None:
    llm = LLM(model_dir("aug"))
    free = llm.generate("ab cd", SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids
    place = next(i for i in range(3, 20) if free[i] not in free[:i])
    before = tiny_tokenizer().decode(free[:place])
    for keep in (False, True):
        params = SamplingParams(
            max_tokens=20,
            ignore_eos=True,
            stop_token_ids=[free[place]],
            include_stop_str_in_output=keep,
        )
        found = llm.generate("ab cd", params)[0]
        assert (found.token_ids, found.finish_reason) == (free[: place + 1], "stop")
        shown = tiny_tokenizer().decode(free[: place + 1]) if keep else before
        assert found.text == shown


def test_special_tokens_are_shown_on_demand() -> None:
    llm = LLM(model_dir("aug"))
    bias = {0: 1000.0}
    hidden = SamplingParams(max_tokens=3, logit_bias=bias, ignore_eos=True)
    assert llm.generate("ab", hidden)[0].text == ""
    ignoring = SamplingParams(
        max_tokens=3, logit_bias=bias, ignore_eos=True, skip_special_tokens=False
    )
    assert llm.generate("ab", ignoring)[0].text == "<|eos|>" * 3
    for keep, text in ((False, ""), (True, "<|eos|>")):
        params = SamplingParams(
            logit_bias=bias, skip_special_tokens=False, include_stop_str_in_output=keep
        )
        found = llm.generate("ab", params)[0]
        assert (found.text, found.finish_reason, found.token_ids) == (text, "stop", (0,))


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_stop_strings_wait_for_min_tokens_and_are_shown_on_demand(drafter: str) -> None:
    llm = LLM(model_dir("aug"), drafter=drafter, policy=4)
    free = llm.generate("abcd" * 5, SamplingParams(max_tokens=30, ignore_eos=True))[0]
    stop = free.text[:1]
    again = free.text.find(stop, 1)
    ends = {}
    for least in (0, 1):
        for keep in (False, True):
            params = SamplingParams(
                max_tokens=30,
                ignore_eos=True,
                stop=stop,
                min_tokens=least,
                include_stop_str_in_output=keep,
            )
            pieces = list(llm.stream("abcd" * 5, params))
            assert pieces[-1].done is not None
            ends[least, keep] = pieces[-1].done.text
            assert "".join(piece.text for piece in pieces) == pieces[-1].done.text
    assert (ends[0, False], ends[0, True]) == ("", stop)
    if again > 0:
        assert ends[1, False] == free.text[:again]
        assert ends[1, True] == free.text[: again + 1]


def test_logits_that_are_damaged_are_still_named() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=1.0), [0], 3)
    with pytest.raises(NotFinite):
        GreedyVerifier().accept(from_paths(0, []), torch.full((1, 3), math.nan), sampler)


def test_more_logprobs_than_there_are_tokens_are_those_of_all() -> None:
    params = SamplingParams(max_tokens=2, logprobs=10**6, prompt_logprobs=10**6)
    llm = LLM(model_dir("aug"))
    (found,) = llm.generate([[5, 6, 7]], params)
    assert found.logprobs is not None and found.prompt_logprobs is not None
    entries = [*found.logprobs, *found.prompt_logprobs[1:]]
    assert {len(each.top) for each in entries if each} == {llm.model.config.vocab_size}


@pytest.mark.parametrize("setting", ["max_tokens", "min_tokens", "n", "top_k", "logprobs", "seed"])
def test_a_text_was_shown_like_the_number_that_it_is_not(setting: str) -> None:
    wrong: Any = {setting: "5"}
    with pytest.raises(ConfigError, match=f"{setting} must be .* got '5'"):
        SamplingParams(**wrong)


def test_numbers_of_numpy_are_numbers_and_truth_values_are_none() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_p=np.float64(0.5), min_p=np.int64(0))
    assert (params.temperature, params.top_p, params.min_p) == (0.5, 0.5, 0.0)
    assert type(params.temperature) is float
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        with pytest.raises(ConfigError, match=f"{name} must be a number, got True"):
            SamplingParams(**{name: True})  # type: ignore[arg-type]
