from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from linspec.errors import ConfigError, InputError
from linspec.evaluate.positions import by_position
from linspec.evaluate.recall import Writer, evaluate_recall
from linspec.evaluate.repeats import evaluate_repeats
from linspec.models.decoder import Decoder
from linspec.train.recall_texts import CUES, TASKS

FILLER = tiny_tokenizer()("abcd end the end\n" * 200, add_special_tokens=False)["input_ids"]


class Echo(torch.nn.Module):
    """Copies perfectly: repeats what stood a fixed number of tokens above."""

    def __init__(self, model: Decoder, distance: int) -> None:
        super().__init__()
        self.config, self.device, self.distance = model.config, model.device, distance

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        # position t predicts t + 1, which is what stands at t + 1 - distance
        return torch.nn.functional.one_hot(
            ids.roll(self.distance - 1, 1), self.config.vocab_size
        ).float()

    def head(self, states: torch.Tensor) -> torch.Tensor:
        return 100 * states


@given(
    seed=st.integers(0, 2**20),
    task=st.sampled_from(TASKS),
    cue=st.sampled_from(sorted(CUES.values())),
    length=st.sampled_from((1200, 1601, 2048)),
)
def test_every_answer_stands_at_its_distance(
    seed: int, task: object, cue: str, length: int
) -> None:
    write = Writer(tiny_tokenizer(), FILLER * 3, cue)
    question = write(task, length, (400, 900, 5000), random.Random(seed))  # type: ignore[arg-type]
    assert len(question.ids) == length
    assert [distance for distance, _, _ in question.answers] == [900, 400]
    for distance, begin, end in question.answers:
        answer = question.ids[begin:end]
        assert len(answer) > 1
        assert question.ids[begin - distance : end - distance] == answer
        # the cue is the same too, and this answer is nowhere else
        assert (
            question.ids[begin - 6 - distance : begin - distance] == question.ids[begin - 6 : begin]
        )
        places = [i for i in range(length) if question.ids[i : i + len(answer)] == answer]
        assert places == [begin - distance, begin]


def test_a_model_that_copies_has_full_recall_at_its_distance_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = text_model("softmax", max_positions=2048)
    echo = Echo(model, 400)
    options = {"tokenizer": tiny_tokenizer(), "lengths": (1200,), "distances": (400, 900)}
    monkeypatch.setattr("linspec.evaluate.recall.Decoder", Echo)
    found = evaluate_recall(echo, teacher=echo, samples=3, **options)  # type: ignore[arg-type]
    exact = {(c.task, c.distance): c.exact for c in found.cells}
    assert exact == {(t.name, d): float(d == 400) for t in TASKS for d in (400, 900)}
    assert {c.relative for c in found.cells if c.distance == 400} == {1.0}
    assert found.relative == 1.0 and found.exact == 0.5
    # what the teacher has right; nothing is said where it has nothing
    assert {c.kept for c in found.cells if c.distance == 400} == {1.0}
    assert {c.kept for c in found.cells if c.distance == 900} == {None}
    worse = evaluate_recall(Echo(model, 300), teacher=echo, samples=3, **options)  # type: ignore[arg-type]
    assert {c.kept for c in worse.cells if c.distance == 400} == {0.0}


def test_a_teacher_that_ends_earlier_is_named() -> None:
    student, teacher = text_model("aug"), text_model("softmax", max_positions=700)
    found = evaluate_recall(
        student,
        teacher=teacher,
        tokenizer=tiny_tokenizer(),
        lengths=(600, 1200),
        distances=(400,),
        samples=1,
        seeds=2,
    )
    assert {c.length for c in found.cells if c.teacher_tokens is None} == {1200}
    assert len(found.limits) == 1 and "teacher ends at 700" in found.limits[0]
    assert all(c.answers == 2 for c in found.cells)
    with pytest.raises(ConfigError, match="no length"):
        evaluate_recall(teacher, tokenizer=tiny_tokenizer(), lengths=(1200,))


@pytest.mark.parametrize("measure", [evaluate_recall, evaluate_repeats])
@pytest.mark.parametrize(
    ("source", "teacher"), [("embedded-softmax", model_dir), (model_dir, "embedded-softmax")]
)
def test_a_teacher_that_numbers_text_otherwise_is_refused(
    measure: Callable[..., Any], source: Any, teacher: Any
) -> None:
    """One model once read the other's ids: nonsense, or an IndexError."""
    one, other = (each if isinstance(each, str) else each("softmax") for each in (source, teacher))
    with pytest.raises(ConfigError, match="numbers text otherwise"):
        measure(one, teacher=other, lengths=(256,), samples=1)


@pytest.mark.parametrize("measure", [evaluate_recall, evaluate_repeats])
def test_what_does_not_continue_a_text_is_told_which_verb_measures_it(
    measure: Callable[..., Any],
) -> None:
    with pytest.raises(ConfigError, match="'diffusion'.*linspec eval perplexity` measures it"):
        measure("embedded-diffusion", lengths=(512,), samples=1)


def test_lengths_without_room_are_refused_before_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = text_model("aug")
    monkeypatch.setattr(model, "hidden", None)
    with pytest.raises(ConfigError, match="fits 200 tokens; give lengths of 257 or more"):
        evaluate_recall(model, tokenizer=tiny_tokenizer(), lengths=(1200, 200), samples=1)


def test_a_text_that_is_too_short_is_not_repeated_to_hold_a_passage_twice(tmp_path: Path) -> None:
    """The passage stood several times in between, which was reported as memory."""
    short = tmp_path / "short.txt"
    short.write_text("some words of a text, and others. " * 12)
    options = {"tokenizer": tiny_tokenizer(), "data": (short,), "samples": 1, "passage": 30}
    model = text_model("aug")
    with pytest.raises(ConfigError, match="held-out text has .* tokens: no figure at"):
        evaluate_repeats(model, lengths=(5000,), **options)  # type: ignore[arg-type]
    found = evaluate_repeats(model, lengths=(60, 5000), **options)  # type: ignore[arg-type]
    assert [cell.length for cell in found.cells] == [60] and len(found.limits) == 1


@pytest.mark.parametrize("measure", [evaluate_recall, evaluate_repeats])
def test_the_model_attends_as_asked_and_its_teacher_reads_everything(
    measure: Callable[..., Any],
) -> None:
    sizes = {"recall": {"lengths": (600,), "distances": (400,)}, "repeats": {"lengths": (300,)}}
    options = {"tokenizer": tiny_tokenizer(), "samples": 2, "data": ("stdlib",)}
    options |= sizes[measure.__name__.removeprefix("evaluate_")]
    make = partial(text_model, "softmax", max_positions=700)
    plain = measure(make(), teacher=make(), **options)
    whole = measure(make(), teacher=make(), attention="pages:budget=4096", **options)
    few = measure(make(), teacher=make(), attention="streaming:span=1,group=16", **options)
    assert whole == plain
    assert few != plain
    own, theirs = (dataclasses.asdict(found.cells[0]) for found in (few, plain))
    for name in {"teacher_tokens", "teacher_gain"} & set(own):
        assert own[name] == theirs[name]


@pytest.mark.parametrize(
    "settings",
    [
        {"samples": 0},
        {"seeds": 0},
        {"lengths": ()},
        {"lengths": (600,), "distances": (500,)},
        {"lengths": (600,), "distances": (400, 399)},
    ],
)
def test_impossible_recall(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        evaluate_recall(text_model("aug"), tokenizer=tiny_tokenizer(), **settings)  # type: ignore[arg-type]


def test_a_model_that_copies_gains_on_repeats_at_its_distance_only(
    monkeypatch: pytest.MonkeyPatch, book: str
) -> None:
    model = text_model("softmax", max_positions=2048)
    echo = Echo(model, 300)
    options = {"tokenizer": tiny_tokenizer(), "data": [book], "passage": 50, "samples": 3}
    with monkeypatch.context() as patched:
        patched.setattr("linspec.evaluate.recall.Decoder", Echo)
        found = evaluate_repeats(echo, teacher=echo, lengths=(350, 700), **options)  # type: ignore[arg-type]
    near, far = found.cells
    assert near.distance == 300 and near.again == pytest.approx(0, abs=1e-4)
    assert near.relative == 1.0 and near.gain > 20
    assert near.right == 1.0 and near.kept == 1.0 and far.right < 0.5
    assert abs(far.gain) < near.gain / 2
    short = text_model("softmax", max_positions=400)
    limited = evaluate_repeats(short, lengths=(350, 700), **options)  # type: ignore[arg-type]
    assert [cell.length for cell in limited.cells] == [350] and len(limited.limits) == 1
    with pytest.raises(ConfigError, match="no length"):
        evaluate_repeats(short, lengths=(700,), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hold a passage twice"):
        evaluate_repeats(short, lengths=(90,), **options)  # type: ignore[arg-type]


@pytest.fixture
def book(tmp_path: object) -> str:
    path = tmp_path / "book.txt"  # type: ignore[operator]
    rng = random.Random(0)
    path.write_text(" ".join(rng.choice(("ab", "cd", "end", "the")) for _ in range(900)))
    return str(path)


def test_a_model_of_bounded_reach_does_not_drift(book: str) -> None:
    model = text_model("window")
    found = by_position(
        model, tokenizer=tiny_tokenizer(), data=[book], length=600, context=100, texts=2
    )
    assert found.texts == 2 and found.limit is None
    # a window of 5 tokens sees no difference half a context into a text
    assert found.drift == pytest.approx(1.0, abs=1e-4)
    assert [(s.begin, s.end) for s in found.stretches] == [(0, 256), (256, 512), (512, 600)]
    assert [s.perplexity for s in found.stretches] == pytest.approx(
        [s.fresh for s in found.stretches], rel=1e-4
    )


def test_positions_end_with_the_model_or_the_text(book: str) -> None:
    options = {"tokenizer": tiny_tokenizer(), "data": [book]}
    softmax = by_position(text_model("softmax"), length=1000, **options)  # type: ignore[arg-type]
    assert softmax.length == 256 and "256 positions" in str(softmax.limit)
    aug = by_position(text_model("aug"), length=100_000, **options)  # type: ignore[arg-type]
    assert aug.length < 100_000 and "held-out text ends" in str(aug.limit)
    with pytest.raises(ConfigError):
        by_position(text_model("aug"), length=1, **options)  # type: ignore[arg-type]
    with pytest.raises((ConfigError, InputError)):
        by_position(text_model("aug"), texts=0, **options)  # type: ignore[arg-type]
