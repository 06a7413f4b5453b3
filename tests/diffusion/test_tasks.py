"""What policies cost and lose on tasks with one right answer, by a model that is trained for them here."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import diffusion_tasks as tasks
import pytest
import torch
from checkpoints import scratch, tiny_tokenizer

from linspec import LLM, SamplingParams
from linspec.diffusion.filters import save_filter
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.commit_filter import FilterConfig, train_filter

pytestmark = pytest.mark.slow
PROMPTS = 200


@dataclass(frozen=True)
class Measured:
    """right: percent of answers; computed: positions × layers."""

    answers: list[tuple[int, ...]]
    right: float
    forwards: int
    computed: int


LONG = 400
# a model that has learned half of it: what its forwards say changes on the way
SHORT = 120


@cache
def model(steps: int = LONG) -> MaskedDiffusion:
    return tasks.trained(steps)


@cache
def measured(spec: str, steps: int = LONG) -> Measured:
    prompts, answers = tasks.draw(PROMPTS, torch.Generator().manual_seed(99))
    # every block is computed unless the spec says when to stop
    loop = f"masked-diffusion:{spec}" + ("" if "stop=" in spec else ",stop=never")
    llm = LLM(deepcopy(model(steps)), tokenizer=tiny_tokenizer(), loop=loop, max_batch=32)
    params = SamplingParams(max_tokens=tasks.ANSWER, ignore_eos=True)
    found = llm.generate([row.tolist() for row in prompts], params)
    texts = [each.token_ids for each in found]
    right = sum(text == tuple(row.tolist()) for text, row in zip(texts, answers, strict=True))
    stats = [each.stats for each in found]
    forwards, computed = sum(e.rounds for e in stats), sum(e.computed for e in stats)
    return Measured(texts, 100 * right / PROMPTS, forwards, computed)


def test_a_threshold_needs_a_third_of_the_forwards() -> None:
    static = measured("commit=static")
    assert static.right >= 90 and static.forwards == PROMPTS * tasks.ANSWER
    for commit in ("threshold:0.9", "factor:0.5", "entropy:0.3"):
        found = measured(f"commit={commit}")
        assert found.forwards <= 0.35 * static.forwards
        assert found.right >= 0.98 * static.right


def test_caches_compute_half_and_lose_little() -> None:
    none = measured("commit=static,block=fixed:4")
    for cached, most in (("dual", 0.5), ("prefix", 0.6)):
        found = measured(f"commit=static,block=fixed:4,cache={cached}")
        assert found.forwards == none.forwards and found.computed <= most * none.computed
        assert found.right >= none.right - 2


def test_local_leap_needs_no_more_forwards_than_its_threshold() -> None:
    strict, leapt = measured("commit=threshold:0.9"), measured("commit=local-leap")
    assert leapt.forwards < strict.forwards <= 0.3 * measured("commit=static").forwards
    assert leapt.right >= strict.right - 1


@pytest.mark.parametrize("over", ["mean", "least"])
def test_prophet_stops_early_with_the_same_answers(over: str) -> None:
    static, found = measured("commit=static"), measured(f"commit=static,stop=prophet:over={over}")
    assert found.forwards <= 0.6 * static.forwards
    assert found.right >= static.right - 1
    same = sum(a == b for a, b in zip(found.answers, static.answers, strict=True))
    assert same >= 0.97 * PROMPTS


@pytest.mark.parametrize(("drafts", "least"), [(4, 1.8), (8, 2.5)])
def test_freedave_decides_several_tokens_a_forward_and_the_same_ones(
    drafts: int, least: float
) -> None:
    static = measured("commit=static")
    found = measured(f"commit=static,verify=freedave:{drafts}")
    assert found.answers == static.answers
    assert least * found.forwards <= PROMPTS * tasks.ANSWER
    # drafts cost work, which the forwards that they save give back in part
    assert static.computed <= found.computed <= 2 * static.computed


def test_freedave_plus_loses_little_beside_its_threshold() -> None:
    strict = measured("commit=threshold:0.99")
    found = measured("commit=threshold:0.99,verify=freedave-plus:4")
    assert found.forwards <= strict.forwards and found.right >= strict.right - 1


def agreement(found: Measured, other: Measured) -> float:
    pairs = zip(found.answers, other.answers, strict=True)
    return sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True)) / (
        PROMPTS * tasks.ANSWER
    )


def test_delayed_caches_compute_half_and_say_the_same() -> None:
    for commit in ("commit=static", "commit=static:order=left"):
        none, found = measured(commit), measured(f"{commit},cache=dkv")
        assert found.forwards == none.forwards and found.computed <= 0.5 * none.computed
        assert agreement(found, none) >= 0.95 and found.right >= none.right - 1
    greedy = measured("commit=static:order=left,cache=dkv-greedy:4")
    assert greedy.computed <= 0.5 * none.computed


def test_elastic_refreshes_where_attention_drifts() -> None:
    none = measured("commit=static,block=sliding:4")
    found = [
        measured(f"commit=static,block=sliding:4,cache=elastic:{gamma}")
        for gamma in (0.7, 0.8, 0.9, 0.95)
    ]
    computed = [each.computed for each in found]
    assert computed == sorted(computed) and computed[-1] <= 0.55 * none.computed
    for each in found:
        assert agreement(each, none) >= 0.95 and each.right >= none.right - 1


def test_a_trained_filter_knows_what_is_final() -> None:
    prompts, _ = tasks.draw(400, torch.Generator().manual_seed(5))
    config = FilterConfig(block=tasks.ANSWER, tokens=tasks.ANSWER)
    trained = train_filter(
        deepcopy(model(SHORT)), prompts.tolist(), config, tokenizer=tiny_tokenizer()
    )
    # of prompts that it was not trained on
    assert trained.precision is not None and trained.precision >= 0.97
    assert trained.auc is not None and trained.auc >= 0.93
    folder = save_filter(trained.filter, model(SHORT), scratch("learn2pd") / "f")
    static = measured("commit=static", SHORT)
    found = measured(f"commit=learn2pd:path={folder}", SHORT)
    assert found.right >= static.right - 1
    assert found.forwards <= 0.4 * static.forwards
    assert found.forwards <= 1.05 * measured("commit=threshold:0.9", SHORT).forwards
    fewest = static.forwards * trained.fewest / trained.static
    assert static.forwards - found.forwards >= 0.6 * (static.forwards - fewest)


def test_drafts_that_are_edited_need_fewer_forwards_than_a_high_threshold() -> None:
    strict = measured("commit=threshold:0.9", SHORT)
    found = measured("commit=draft-and-edit", SHORT)
    assert found.forwards <= 0.8 * strict.forwards and found.right >= strict.right - 1


def test_a_foreseen_end_computes_less_than_half_of_a_long_output() -> None:
    # what is cut must look like an output to the model: it was trained on all lengths
    made, length = tasks.trained(260, batch=64, lengths=(7, 24)), 24
    prompts, answers = tasks.draw(PROMPTS, torch.Generator().manual_seed(99), length)
    wanted = [tuple(row[: tasks.COUNT + 1].tolist()) for row in answers]
    found = []
    for stop in ("end-of-text", "foreseen-end"):
        loop = f"masked-diffusion:commit=static,stop={stop}"
        llm = LLM(deepcopy(made), tokenizer=tiny_tokenizer(), loop=loop, max_batch=32)
        results = llm.generate(prompts.tolist(), SamplingParams(max_tokens=length))
        right = sum(e.token_ids == text for e, text in zip(results, wanted, strict=True))
        found.append((sum(each.stats.computed for each in results), right))
    (whole, before), (cut, after) = found
    assert before >= 0.5 * PROMPTS and after >= 0.9 * before
    assert cut <= 0.5 * whole
