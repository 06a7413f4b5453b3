"""dParallel's claim: a model that says its answer as a chain learns to say more of it in one forward.

Most of that is learned by cross entropy alone; the entropy term makes it surer, but hardly faster at the same
quality. Where many answers are right it makes the model falsely sure.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import chained_tasks as task
import pytest
import torch
from checkpoints import scratch, tiny_tokenizer

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_diffusion, save_model
from linspec.evaluate.parallel_forms import Digits, Numbers
from linspec.evaluate.parallel_models import train_task_model
from linspec.evaluate.parallel_tasks import Question, ask
from linspec.train.parallel import ParallelConfig, train_parallel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPTS = 300


def chained(prompt: tuple[int, ...], answer: tuple[int, ...]) -> bool:
    """Whether an answer is right."""
    wanted = torch.tensor(prompt[: task.COUNT]).cumsum(0) % task.BASE
    return answer == tuple(wanted.tolist())


@cache
def base() -> Path:
    return save_model(task.trained(1500), None, scratch("chained") / "base")


@cache
def student(weight: float) -> Path:
    """Trained on answers to prompts that nothing is measured on."""
    asked, _ = task.draw(3000, torch.Generator().manual_seed(5))
    measured, _ = task.draw(PROMPTS, torch.Generator().manual_seed(99))
    own = {tuple(row) for row in measured.tolist()}
    prompts = [row for row in asked.tolist() if tuple(row) not in own]
    sizes: dict[str, Any] = {"tokens": task.COUNT, "block": None, "rows": 48, "batch": 64}
    config = ParallelConfig(steps=1000, lr=2e-3, weight=weight, precision="float32", **sizes)
    given: dict[str, Any] = {"right": chained, "tokenizer": tiny_tokenizer()}
    return train_parallel(base(), scratch("chained") / f"w{weight}", prompts, config, **given)


def decoded(folder: Path, commit: str) -> tuple[float, float]:
    """Percent of answers that are right, and forwards of one."""
    prompts, answers = task.draw(PROMPTS, torch.Generator().manual_seed(99))
    loop = f"masked-diffusion:stop=never,commit={commit}"
    llm = LLM(deepcopy(load_diffusion(folder)), tokenizer=tiny_tokenizer(), loop=loop, max_batch=32)
    params = SamplingParams(max_tokens=task.COUNT, ignore_eos=True)
    found = llm.generate(prompts.tolist(), params)
    pairs = zip(found, answers.tolist(), strict=True)
    right = sum(each.token_ids == tuple(answer) for each, answer in pairs)
    return 100 * right / PROMPTS, sum(each.stats.rounds for each in found) / PROMPTS


def fewest(folder: Path, least: float) -> float:
    """Forwards of an answer by the best threshold that gets so many percent right."""
    rules = [f"threshold:{each}" for each in (0.99, 0.95, 0.9, 0.7)]
    return min(
        forwards for right, forwards in (decoded(folder, e) for e in rules) if right >= least
    )


def test_a_student_needs_fewer_forwards_for_as_many_right_answers() -> None:
    least = decoded(base(), "static")[0] - 1
    assert fewest(student(2.0), least) <= 0.75 * fewest(base(), least)


def test_the_entropy_term_makes_it_surer_than_cross_entropy_alone() -> None:
    (right, forwards), (_, control) = (decoded(student(w), "entropy:0.02") for w in (2.0, 0.0))
    assert forwards < control and right >= 99
    record = json.loads((student(2.0) / "parallel.json").read_text())
    told = record["after"]
    assert told["sure"] > record["before"]["sure"]
    assert told["sure_and_right"] >= 0.98 * told["sure"]


NAMES = 5


@cache
def mixing() -> Path:
    """A model of a task of which every order of the names is a right answer."""
    model = train_task_model(2000, tasks=("shuffle",), lengths=(NAMES,))
    return save_model(model, None, scratch("mixing") / "base")


def asked(count: int, seed: int) -> dict[tuple[int, ...], Question]:
    rng = random.Random(seed)
    drawn = [ask("shuffle", NAMES, rng) for _ in range(count)]
    return {tuple(Numbers().prompt(each)): each for each in drawn}


@cache
def mixed(weight: float) -> tuple[float, dict[str, float]]:
    """Percent of right answers of a student by a threshold, and what training told of it."""
    measured, learned = asked(PROMPTS, 99), asked(3000, 5)
    prompts = [each for each in learned if each not in measured]
    sizes: dict[str, Any] = {"tokens": NAMES, "block": None, "rows": 48, "batch": 64}
    config = ParallelConfig(steps=1000, lr=2e-3, weight=weight, precision="float32", **sizes)
    place = scratch("mixing") / f"w{weight}"
    given: dict[str, Any] = {"right": lambda p, a: learned[p].right(a), "tokenizer": Digits()}
    train_parallel(mixing(), place, prompts, config, **given)
    loop = "masked-diffusion:block=fixed:none,stop=never,commit=threshold:0.9"
    llm = LLM(load_diffusion(place), tokenizer=Digits(), loop=loop, max_batch=32)
    params = SamplingParams(max_tokens=NAMES, ignore_eos=True)
    found = llm.generate([list(each) for each in measured], params)
    right = sum(q.right(each.token_ids) for q, each in zip(measured.values(), found, strict=True))
    return 100 * right / len(measured), json.loads((place / "parallel.json").read_text())["after"]


def test_where_many_answers_are_right_the_entropy_term_makes_falsely_sure() -> None:
    """Why it is for answers that are determined: the model learns one of many as if it were the only one."""
    (right, told), (plain, control) = mixed(2.0), mixed(0.0)
    assert right < plain - 5 and plain >= 98
    assert told["sure"] > control["sure"]
    assert told["sure_and_right"] < 0.9 * told["sure"]
    assert control["sure_and_right"] >= 0.9 * control["sure"]
