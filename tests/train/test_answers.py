"""The model's own answers: made once, kept as they come, and what a drafter then learns from."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from linspec import LLM, SamplingParams
from linspec.cli import app
from linspec.engine.encoding import TextEncoder
from linspec.errors import ConfigError, InputError, TrainingError
from linspec.train import answers as module
from linspec.train.answers import AnswersConfig, make_answers, prompts_of, streams_of
from linspec.train.drafters import DrafterConfig, train_drafter

TEXTS = [
    "the old fox",
    "a red dog sees",
    "my big house and",
    "near my",
    "the fox runs",
    "old dog",
]
SHORT = DrafterConfig(
    tokens=4 * 256, context=32, batch_tokens=256, calibration_tokens=64, precision="float32"
)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def asked(prompts_file: Path, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, ...]]:
    return prompts_of(AnswersConfig(prompts=prompts_file), TextEncoder(tokenizer, len(tokenizer)))


@pytest.fixture
def interrupted_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Ctrl-C comes when so many answers are written; None: never."""
    whole = LLM.stream

    def interrupt(count: int | None) -> None:
        def stream(self: LLM, *args: Any, **options: Any) -> Any:
            left = count
            for piece in whole(self, *args, **options):
                yield piece
                left = left - (piece.done is not None) if left is not None else None
                if left == 0:
                    raise KeyboardInterrupt

        monkeypatch.setattr(LLM, "stream", stream)

    return interrupt


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_the_tokens_of_generate(
    teacher_dir: Path, tmp_path: Path, asked: list[tuple[int, ...]], temperature: float, batch: int
) -> None:
    config = AnswersConfig(tokens=12, temperature=temperature, batch=batch, seed=3)
    found = make_answers(teacher_dir, asked, config, tmp_path / "a.jsonl")
    for i, (prompt, answer) in enumerate(zip(asked, found, strict=True)):
        params = SamplingParams(max_tokens=12, temperature=temperature, seed=3 * 1_000_003 + i)
        expected = LLM(teacher_dir).generate([list(prompt)], params)[0]
        assert expected.token_ids == answer


@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_resume_behind_any_of_them(
    teacher_dir: Path,
    tmp_path: Path,
    asked: list[tuple[int, ...]],
    interrupted_after: Callable[[int | None], None],
    after: int,
    temperature: float,
) -> None:
    config = AnswersConfig(tokens=10, temperature=temperature, batch=2)
    whole = make_answers(teacher_dir, asked, config, tmp_path / "whole.jsonl")
    path = tmp_path / "cut.jsonl"
    interrupted_after(after)
    with pytest.raises(KeyboardInterrupt):
        make_answers(teacher_dir, asked, config, path)
    before = path.read_bytes()
    assert before.count(b"\n") == after
    # a power cut in the middle of a record
    path.write_bytes(before + b'{"prompt": 0, "tok')
    interrupted_after(None)
    assert make_answers(teacher_dir, asked, config, path) == whole
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == len(asked)


def test_a_killed_process_leaves_whole_answers(teacher_dir: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "a.jsonl", AnswersConfig(tokens=60, batch=2)
    asked = [(1 + i, 2, 3) for i in range(280)]
    writer = os.fork()
    if writer == 0:
        make_answers(teacher_dir, asked, config, path)
        os._exit(0)
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        time.sleep(0.01)
    os.kill(writer, signal.SIGKILL)
    assert os.waitpid(writer, 0)[1] == signal.SIGKILL
    content = path.read_bytes()
    records = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    assert 3 <= len(records) < len(asked)
    few = [asked[record["prompt"]] for record in records]
    again = make_answers(teacher_dir, few, config, tmp_path / "again.jsonl")
    assert [tuple(record["tokens"]) for record in records] == again


def test_whole_answers_need_no_model(
    teacher_dir: Path, tmp_path: Path, asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = AnswersConfig(tokens=5), tmp_path / "a.jsonl"
    found = make_answers(teacher_dir, asked, config, path)
    monkeypatch.setattr(module, "LLM", None)
    assert make_answers(teacher_dir, asked, config, path) == found


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        '{"prompt": 99, "tokens": []}',
        '{"prompt": 0}',
        "[1]",
        '{"prompt":0,"tokens":5}',
        # which no embedding has
        '{"prompt":0,"tokens":[99999999]}',
        '{"prompt":0,"tokens":[-1]}',
        '{"prompt":0,"tokens":[1.5]}',
    ],
)
def test_a_file_of_something_else_is_refused(
    teacher_dir: Path, tmp_path: Path, asked: list[tuple[int, ...]], line: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TrainingError, match="line 1: .* no answer to one of these prompts"):
        make_answers(teacher_dir, asked, AnswersConfig(), path)
    assert path.read_text() == line + "\n"


def test_prompts_are_cut_from_texts_and_fit_the_model(
    tokenizer: PreTrainedTokenizerFast, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = TextEncoder(tokenizer, len(tokenizer))
    config = AnswersConfig(tokens=6, prompt_tokens=4)
    ids = tuple(encoder.encode(text))
    found = prompts_of(config, encoder, texts=[text])
    assert found == [ids[at : at + 4] for at in range(0, len(ids) - 3, 10)]
    assert prompts_of(config, encoder, texts=[text] * 9, most=5) == found[:5]
    other = [text, text[5:], text[9:]]
    assert prompts_of(config, encoder, texts=other) != prompts_of(
        replace(config, seed=1), encoder, texts=other
    )
    with pytest.raises(InputError, match="no prompt is left"):
        prompts_of(config, encoder, texts=[text], limit=4)
    assert f"{len(found)} of {len(found)} prompts are left out" in capsys.readouterr().err


def test_streams_are_prompts_with_answers_once_each_and_end_once() -> None:
    prompts = [(i, 5) for i in range(100)]
    answers = [(7, 0) if i % 2 else (8, 8) for i in range(100)]
    train, heldout = streams_of(prompts, answers, 0)
    assert len(heldout) and len(train) + len(heldout) == 4 * 50 + 5 * 50
    texts = {
        tuple(map(int, part.split()))
        for stream in (train, heldout)
        for part in " ".join(map(str, stream)).split(" 0")
        if part
    }
    assert len(texts) >= 99
    # what is held out does not depend on the others
    assert set(streams_of(prompts[:50], answers[:50], 0)[1]) <= set(heldout)
    assert [len(each) > 0 for each in streams_of(prompts[:2], answers[:2], 0)] == [True, True]
    with pytest.raises(InputError, match="give two or more"):
        streams_of(prompts[:1], answers[:1], 0)


def train(model: Path, out: Path, prompts: Path, **options: Any) -> Path:
    asked = AnswersConfig(prompts=prompts, tokens=20, batch=2)
    given: dict[str, Any] = {"kind": "medusa:heads=2", "config": SHORT, "answers": asked}
    return train_drafter(model, out, **(given | options))


def test_a_killed_run_goes_on_with_its_answers_and_a_fresh_one_makes_none(
    teacher_dir: Path,
    tmp_path: Path,
    prompts_file: Path,
    interrupted_after: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted_after(2)
    with pytest.raises(KeyboardInterrupt):
        train(teacher_dir, tmp_path / "cut", prompts_file)
    kept = tmp_path / "cut" / "training" / "answers.jsonl"
    assert kept.read_bytes().count(b"\n") == 2
    # no more than the four that are missing are made
    interrupted_after(5)
    cut = train(teacher_dir, tmp_path / "cut", prompts_file, resume=True)
    assert not (cut / "training").exists()
    # another kind, the same answers
    monkeypatch.setattr(module, "LLM", None)
    fresh = train(teacher_dir, tmp_path / "fresh", prompts_file)
    for name in ("drafter.json", "drafter.safetensors"):
        assert (cut / name).read_bytes() == (fresh / name).read_bytes()
    train(teacher_dir, tmp_path / "other", prompts_file, kind="medusa:heads=1")
    plan = json.loads((fresh / "drafter.json").read_text())["plan"]["answers"]
    assert plan["prompts"] == str(prompts_file) and plan["count"] == len(TEXTS)
    asked = AnswersConfig(prompts=prompts_file, tokens=21)
    with pytest.raises(TrainingError, match=r"answers\.tokens = 20, now it is 21"):
        train(teacher_dir, fresh, prompts_file, resume=True, answers=asked)


def test_the_command_cuts_prompts_from_texts_and_refuses_what_is_not_clear(
    teacher_dir: Path, tmp_path: Path, corpus: Path, prompts_file: Path
) -> None:
    def run(*args: object) -> Any:
        command = ("train-drafter", teacher_dir, "--kind", "medusa:heads=1", "--context", 32)
        return CliRunner().invoke(app, [str(a) for a in (*command, *args)])

    found = run(
        *("--data", corpus, "--answer-tokens", 9, "--tokens", 500, "--batch-tokens", 128),
        *("--out", tmp_path / "d"),
    )
    assert found.exit_code == 0, found.output
    plan = json.loads((tmp_path / "d" / "drafter.json").read_text())["plan"]["answers"]
    assert plan["prompts"] is None and plan["tokens"] == 9 and plan["count"] == 7
    assert "answers of the model: 7/7" in found.stderr
    both = run("--prompts", prompts_file, "--data", corpus, "--out", tmp_path / "e")
    assert both.exit_code == 1 and "give one of the two" in both.stderr
    alone = run("--temperature", 1, "--out", tmp_path / "e")
    assert alone.exit_code == 1 and "give --prompts or --answer-tokens" in alone.stderr


def test_settings_are_checked() -> None:
    for wrong in ({"tokens": 0}, {"batch": 0}, {"temperature": -1.0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            AnswersConfig(**wrong)  # type: ignore[arg-type]
