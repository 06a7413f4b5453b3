"""linspec under lm-eval: scores are those of the full form, answers those of LLM.generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed: pip install 'linspec[eval]'"
)

from lm_eval.api.instance import Instance  # noqa: E402

from linspec import LLM, SamplingParams, load_model  # noqa: E402
from linspec.cli import app  # noqa: E402
from linspec.errors import ConfigError  # noqa: E402
from linspec.integrations.lm_eval import LinspecLM, evaluate_tasks, sampling  # noqa: E402

MODEL = "embedded-softmax"
QUESTIONS = [
    {"question": "def f(x):\n    return", "choices": [" x", " banana", " import"], "answer": 0},
    {"question": "for i in", "choices": [" elephants", " range(3):", " 77"], "answer": 1},
    {"question": "import", "choices": [" os", " )))", " 12"], "answer": 0},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "answer.yaml").write_text(ANSWER.format(data=data))
    return folder


@pytest.fixture(scope="module")
def model() -> LinspecLM:
    return LinspecLM(MODEL, batch_size=4)


def asked(kind: str, *pairs: Any) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(pairs)]


def test_scores_are_sums_of_log_probabilities_of_the_full_form(model: LinspecLM) -> None:
    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    found = model.loglikelihood(asked("loglikelihood", *pairs, ("", "def")), disable_tqdm=True)
    decoder = load_model(MODEL)
    for (context, text), (score, same) in zip([*pairs, ("", "def")], found, strict=True):
        given = model.tok_encode(context) or [model.prefix_token_id]
        whole = model.tok_encode(context + text) if context else [*given, *model.tok_encode(text)]
        with torch.no_grad():
            logits = decoder(torch.tensor([whole]))[0].double().log_softmax(-1)
        wanted = range(len(given), len(whole))
        expected = sum(float(logits[i - 1, whole[i]]) for i in wanted)
        assert score == pytest.approx(expected, abs=1e-3)
        assert same == all(int(logits[i - 1].argmax()) == whole[i] for i in wanted)


def test_a_text_longer_than_the_model_is_scored_once_in_windows(tmp_path: Path) -> None:
    short = LinspecLM(MODEL, max_length=16)
    text = "def f(x):\n    return x + 1\n" * 6
    (total,) = short.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), True)
    whole = LinspecLM(MODEL)
    (better,) = whole.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), True)
    assert total < better < 0


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_answers_are_those_of_generate(drafter: str) -> None:
    model = LinspecLM(MODEL, drafter=drafter)
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    pairs = [(q["question"], settings) for q in QUESTIONS]
    found = model.generate_until(asked("generate_until", *pairs), disable_tqdm=True)
    params = SamplingParams(max_tokens=12, stop=["\n"])
    expected = LLM(MODEL).generate([q["question"] for q in QUESTIONS], params)
    assert found == [each.text for each in expected]


def test_tasks_are_evaluated_by_name_and_by_the_verb(tasks: Path) -> None:
    found = evaluate_tasks(MODEL, ["tiny_choice", "tiny_answer"], include=tasks)
    rows = {(row["task"], row["metric"]): row["value"] for row in found["tasks"]}
    assert set(rows) == {("tiny_choice", "acc"), ("tiny_answer", "exact_match")}
    assert rows["tiny_choice", "acc"] == pytest.approx(1.0)
    arguments = ["eval", "task", MODEL, "tiny_choice", "--include", str(tasks), "--limit", "2"]
    said = CliRunner().invoke(app, [*arguments, "--json"])
    assert said.exit_code == 0, said.output
    assert [row["value"] for row in json.loads(said.stdout)["tasks"]] == [1.0]


def test_unknown_tasks_and_settings_are_named(tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"no task 'tiny_choise'; did you mean 'tiny_choice'"):
        evaluate_tasks(MODEL, ["tiny_choise"], include=tasks)
    with pytest.raises(ConfigError, match="generation setting 'num_beams'"):
        sampling({"num_beams": 4})
    assert sampling({"until": ["a", ""], "do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling({"do_sample": True, "temperature": 0.7}).temperature == 0.7


def test_an_answer_that_leaves_no_room_for_its_question_is_named() -> None:
    model = LinspecLM(MODEL, max_length=16)
    with pytest.raises(ConfigError, match="answers of 16 tokens, and this model takes 16"):
        model.generate_until(asked("generate_until", ("a", {"max_gen_toks": 16})), True)
