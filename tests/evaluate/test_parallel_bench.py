"""ParallelBench: tasks and their ceilings exactly, decoders with a perfect model, and small trained ones."""

from __future__ import annotations

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
from denoisers import talker
from typer.testing import CliRunner

from linspec.cli import app
from linspec.diffusion import COMMITS
from linspec.errors import ConfigError, LinspecError
from linspec.evaluate.parallel_bench import Decoder, Judge, ParallelBench, parallel_bench
from linspec.evaluate.parallel_forms import NAMES, Digits, Names, Numbers
from linspec.evaluate.parallel_models import PerfectModel, train_task_model
from linspec.evaluate.parallel_tasks import (
    ALPHABET,
    LONGEST,
    TASKS,
    Question,
    ask,
    ceiling,
    one_step_ceiling,
    shares,
    total_correlation,
)

DETERMINED = ("copy", "reverse", "sort", "insert-index", "remove-index", "replace-index")
# of Kang et al. 2025, and of the same reasoning
PUBLISHED = {
    ("replace-random", 3): 0.444,
    ("replace-random", 4): 0.422,
    ("replace-random", 6): 0.402,
    ("shuffle", 3): 0.222,
    ("shuffle", 4): 0.0938,
    ("shuffle", 6): 0.0154,
}
IN_SHARES = {(4, 2): 0.375, (6, 2): 0.3125, (6, 3): 0.1235}


def perfect(
    task: str, length: int, decoder: Decoder, samples: int, temperature: float = 1
) -> float:
    """How often a perfect model is right through a decoder."""
    rng = random.Random(f"{task} {length}")
    questions = [ask(task, length, rng) for _ in range(samples)]
    judge = Judge(PerfectModel(questions), Digits(), Numbers())
    return judge.cell(decoder, questions, temperature, 0).right


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_is_right_if_it_does_what_the_task_says(task: str) -> None:
    rng = random.Random(3)
    for length in range(2, LONGEST + 1):
        question = ask(task, length, rng)
        assert len({*question.items, question.word}) == length + 1
        drawn = {question.answer(rng) for _ in range(30)}
        assert all(question.right(each) and len(each) == question.length for each in drawn)
        assert (len(drawn) == 1) == (task in DETERMINED)
        wrong = (*question.answer(rng)[:-1], ALPHABET)
        assert not question.right(wrong) and not question.right(())


def test_what_the_tasks_say() -> None:
    line = (5, 2, 9)
    for task, expected in {
        "copy": [(5, 2, 9)],
        "reverse": [(9, 2, 5)],
        "sort": [(2, 5, 9)],
        "remove-random": [(2, 9), (5, 2), (5, 9)],
        "shuffle": sorted(itertools.permutations(line)),
    }.items():
        assert Question(task, line).accepted == expected
    assert Question("insert-index", line, 1, 7).accepted == [(5, 7, 2, 9)]
    assert Question("replace-index", line, 2, 7).accepted == [(5, 2, 7)]
    assert Question("remove-index", line, 0).accepted == [(2, 9)]
    assert len(Question("insert-random", line, word=7).accepted) == 4
    assert len(Question("replace-random", line, word=7).accepted) == 3


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [2, 3, 4, 6])
def test_ceilings_in_closed_form_are_those_of_all_answers(task: str, length: int) -> None:
    accepted = ask(task, length, random.Random(1)).accepted
    size = len(accepted[0])
    assert ceiling(accepted, [size]) == pytest.approx(one_step_ceiling(task, length))
    assert ceiling(accepted, [1] * size) == pytest.approx(1)
    told = PUBLISHED.get((task, length))
    assert told is None or one_step_ceiling(task, length) == pytest.approx(told, abs=5e-4)
    if task in DETERMINED:
        assert one_step_ceiling(task, length) == 1 and total_correlation(accepted) == 0


@pytest.mark.parametrize(("length", "each"), IN_SHARES)
def test_a_line_that_is_shuffled_in_shares(length: int, each: int) -> None:
    found = ceiling(ask("shuffle", length, random.Random(0)).accepted, shares(length, each))
    left, product = length, 1.0
    for share in shares(length, each):
        product *= math.perm(left, share) / left**share
        left -= share
    assert found == pytest.approx(product) == pytest.approx(IN_SHARES[length, each], abs=5e-5)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("task", ["replace-random", "insert-random", "remove-random", "shuffle"])
@pytest.mark.parametrize("each", [2, 0])
def test_the_decoder_loses_what_theory_says(task: str, each: int) -> None:
    """Within 4 standard errors, so tokens are drawn from their distributions."""
    samples, decoder = 250, Decoder(each)
    expected = decoder.ceiling(ask(task, 4, random.Random(0)))
    assert expected is not None
    error = math.sqrt(expected * (1 - expected) / samples)
    assert abs(perfect(task, 4, decoder, samples) - expected) < 4 * error


@pytest.mark.parametrize("order", ["left", "random", "confidence", "margin"])
@pytest.mark.parametrize("task", ["shuffle", "insert-random", "sort"])
def test_one_token_at_a_time_is_always_right(task: str, order: str) -> None:
    spec = f"block=fixed:none,commit=static:order={order}"
    assert perfect(task, 4, Decoder(spec=spec), 24) == 1


def test_the_likeliest_token_never_chooses() -> None:
    assert perfect("replace-random", 4, Decoder(0), 20, temperature=0) == 0
    assert perfect("replace-random", 4, Decoder(0), 60) > 0.2


def test_every_way_to_commit_is_judged() -> None:
    # a filter is trained for one model
    for name in sorted({*COMMITS.names()} - {"learn2pd"}):
        assert perfect("copy", 4, Decoder(spec=f"block=fixed:none,commit={name}"), 6) == 1


def test_what_is_lost_goes_with_what_the_places_share() -> None:
    """By the total correlation; the tasks that lose nothing share nothing."""
    accepted = {task: ask(task, 4, random.Random(2)).accepted for task in TASKS}
    lost = {task: 1 - one_step_ceiling(task, 4) for task in TASKS}
    shared = {task: total_correlation(each) for task, each in accepted.items()}
    assert sorted(TASKS, key=lambda t: round(lost[t], 6)) == sorted(
        TASKS, key=lambda t: round(shared[t], 6)
    )


def bench(**options: object) -> ParallelBench:
    model = train_task_model(2, batch=4)
    return parallel_bench(model, tasks=("copy", "shuffle"), lengths=(3,), samples=6, **options)


def test_cells_of_a_model_that_knows_nothing() -> None:
    found = bench(per_forward=(1, 0), loops=("commit=threshold:0.5",))
    assert [each.decoder for each in found.cells[:3]] == [*found.by_decoder]
    for cell in found.cells:
        assert cell.answers == 6 and cell.right == cell.strict <= 1
        assert (cell.ceiling is None) == (cell.decoder == "commit=threshold:0.5")
        assert cell.perfect is not None
    assert [each.tokens_per_forward for each in found.cells[:2]] == [1, 3]
    assert bench().to_json() == bench().to_json()
    # a model that takes the likeliest has no ceiling in closed form
    assert {each.ceiling for each in bench(temperature=0.0).cells} == {None}


def test_names_are_asked_for_and_read() -> None:
    form = Names(None)
    question = Question("replace-index", (3, 0, 8), 1, 5)
    prompt = str(form.prompt(question))
    assert prompt.endswith("New line:") and prompt.count("New line:") == 2
    assert f"Replace the person at position 1 by {NAMES[5]}." in prompt
    assert list(NAMES) == sorted(NAMES) and len(NAMES) == ALPHABET
    said = json.dumps([NAMES[3], NAMES[5], NAMES[8]])
    for text, items, strict in (
        (f" {said}\n\nLine: {said}", (3, 5, 8), True),
        (f' "{NAMES[3]}" and "{NAMES[5]}"', (3, 5), False),
        (f' "{NAMES[3]}", "{NAMES[5]}", "{NAMES[8]}"]', (3, 5, 8), False),
        ('["Nobody"]', None, True),
        ("", None, False),
    ):
        found = SimpleNamespace(text=text)
        assert (form.read(found), form.strict(found)) == (items, strict)


def test_the_verb_trains_or_asks_a_text_model() -> None:
    shared = ["--tasks", "copy,shuffle", "--lengths", "3", "--samples", "2", "--per-forward", "0"]
    for model, plain in (("tiny", True), (str(talker()), False)):
        args = ["eval", "parallel-bench", model, *shared, "--steps", "1", "--json"]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert [cell["task"] for cell in found["cells"]] == ["copy", "shuffle"]
        assert {cell["perfect"] is not None for cell in found["cells"]} == {plain}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"tasks": ("sorting",)}, "unknown task 'sorting'"),
        ({"lengths": (8,)}, "at most 7"),
        ({"lengths": (1,)}, "lengths"),
        ({"per_forward": (-1,)}, "per_forward"),
        ({"samples": 0}, "samples"),
        ({"per_forward": ()}, "decoders"),
        ({"model": "embedded-softmax"}, "load_model"),
    ],
)
def test_wrong_arguments_are_named_before_any_training(wrong: dict[str, object], why: str) -> None:
    with pytest.raises(LinspecError, match=why):
        parallel_bench(**wrong)


def test_a_perfect_model_has_nothing_to_keep() -> None:
    with pytest.raises(ConfigError, match="use the cache policy 'none'"):
        perfect("copy", 4, Decoder(spec="commit=static,cache=dual,block=fixed:2"), 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_trained_model_copies_in_parallel_and_cannot_shuffle() -> None:
    model = train_task_model(4000, lengths=(4,))
    found = parallel_bench(model, lengths=(4,), per_forward=(1, 0))
    right = {(cell.task, cell.decoder): cell.right for cell in found.cells}
    for task in DETERMINED:
        assert right[task, "1 a forward"] >= 0.97
    at_once = {task: right[task, "all at once"] for task in TASKS}
    assert at_once["copy"] >= 0.9 * right["copy", "1 a forward"]
    assert at_once["shuffle"] < 0.3
    assert at_once["copy"] + 0.03 >= at_once["replace-index"]
    assert at_once["replace-index"] > at_once["replace-random"] > at_once["shuffle"]
