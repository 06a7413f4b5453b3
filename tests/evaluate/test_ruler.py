"""Tasks of RULER: what the texts hold, what an answer scores, and that a length is kept."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from checkpoints import text_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from linspec import LLM
from linspec.errors import ConfigError
from linspec.evaluate.ruler import evaluate_ruler, longest
from linspec.evaluate.ruler_tasks import TASKS, common_words, frequent_words, score, variables

FILLER = ["the", "end", "of", "a", "list", "and", "the", "begin", "of", "it"]
SEEDS = st.integers(0, 2**20)


@given(seed=SEEDS, units=st.integers(8, 60))
def test_variables_are_a_chain_in_order(seed: int, units: int) -> None:
    question = variables(random.Random(seed), units, FILLER)
    example, _, text = question.text.rpartition("The text below")
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
    assert [name for name, _ in lines] == list(question.wanted) and len(lines) == 5
    assert [before for _, before in lines[1:]] == list(question.wanted[:-1])
    assert f"the value {lines[0][1]}," in text and lines[0][1] in question.begin
    assert not set(question.wanted) & set(re.findall(r"\w+", example))
    assert len(text.split()) >= 12 * units


@given(seed=SEEDS, units=st.integers(51, 900))
def test_common_words_are_those_that_stand_most_often(seed: int, units: int) -> None:
    question = common_words(random.Random(seed), units, FILLER)
    listed = re.findall(r"(\d+)\. (\w+)", question.text.rpartition("Below is")[2])
    assert [int(at) for at, _ in listed] == list(range(1, len(listed) + 1))
    assert units - 3 < len(listed) <= units
    counts = Counter(name for _, name in listed).most_common()
    assert {name for name, _ in counts[:10]} == set(question.wanted)
    assert {times for _, times in counts[:10]} == {30 if units >= 600 else 5}
    assert {times for _, times in counts[10:]} == {3 if units >= 600 else 1}


@given(seed=SEEDS, units=st.integers(40, 400))
def test_frequent_words_are_the_three_most_frequent(seed: int, units: int) -> None:
    question = frequent_words(random.Random(seed), units, FILLER)
    drawn = question.text.split("\n\n")[1].split()
    counts = Counter(each for each in drawn if each != "...").most_common()
    assert tuple(name for name, _ in counts[:3]) == question.wanted
    assert counts[2][1] > counts[3][1] and len(drawn) == units


@pytest.mark.parametrize(
    ("answer", "share"),
    [("ABC and DEF.", 1.0), ("ABCD, DEF", 0.5), ("", 0.0), ("abc", 0.0), ("DEF DEF", 0.5)],
)
def test_whole_words_count(answer: str, share: float) -> None:
    assert score(answer, ("ABC", "DEF")) == share


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(text_model("softmax"), tokenizer=tiny_tokenizer())


@pytest.mark.crossed(3)
@pytest.mark.parametrize("name", TASKS)
def test_a_length_is_kept_with_the_answer_and_seeds_repeat(llm: LLM, name: str) -> None:
    task, length = TASKS[name], 8000
    prompt, question = longest(llm, task, length, random.Random(1), FILLER)
    assert 0.9 * length < len(prompt) + task.tokens <= length
    assert llm.tokenizer.decode(prompt).endswith(question.begin[-10:])
    assert longest(llm, task, length, random.Random(1), FILLER) == (prompt, question)
    # before anything is asked
    with pytest.raises(ConfigError, match=f"no room for the shortest text of '{name}'"):
        evaluate_ruler(llm, tasks=(name,), lengths=(100,))


def test_scores_are_means_over_samples(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linspec.evaluate.ruler._asked", lambda *given: given[3].random())
    limit = llm.model.config.position_limit or 10**6
    monkeypatch.setattr("linspec.evaluate.ruler._check_room", lambda *given: None)
    found = evaluate_ruler(llm, tasks=("variables",), lengths=(64, limit + 1), samples=3)
    assert [cell.length for cell in found.cells] == [64] and found.cells[0].samples == 3
    assert found.by_length == {"64": found.cells[0].score}
    assert found.to_json()["limits"][0].startswith(f"the model ends at {limit} positions")
    assert evaluate_ruler(llm, tasks=("variables",), lengths=(64,), samples=3, seed=1) != found
    with pytest.raises(ConfigError, match=r"no task 'variable'; .*did you mean 'variables'"):
        evaluate_ruler(llm, tasks=("variable",))
    with pytest.raises(ConfigError, match="no length can be measured"):
        evaluate_ruler(llm, lengths=(limit + 1,))
