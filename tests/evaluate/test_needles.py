"""Needles in chats, and how close a student is to its teacher."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from helpers import VOCAB, assert_close, random_tokens, tiny_model
from tokenizer_kinds import tokenizer_of

from linspec.errors import ConfigError
from linspec.evaluate.agreement import equal_prefixes, greedy, score
from linspec.evaluate.needles import CLEAR, NAMES, WORDING, questions, recalled
from linspec.train.data import Windows
from linspec.train.needles import WORDINGS, Needles, NeedleWindows, NeedleWriter

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None) -> object:
    made = copy.deepcopy(tokenizer_of("byte-level"))
    made.chat_template = template
    return made


def writer(template: str | None = TEMPLATE, **options: object) -> NeedleWriter:
    made = tokenizer(template)
    filler = np.array(
        made("one two three four five six. " * 300, add_special_tokens=False)["input_ids"]
    )  # type: ignore[operator]
    return NeedleWriter(made, filler, WORDINGS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize(("keys", "asked"), [(1, 1), (4, 1), (4, 3)])
def test_a_chat_has_its_length_and_its_digits_where_it_says(
    template: str | None, keys: int, asked: int
) -> None:
    write = writer(template)
    needles = write.batch(5, 1500, keys=keys, asked=asked, rng=random.Random(0))
    assert needles.tokens.shape == (5, 1500)
    assert needles.places.shape[0] == 5
    for tokens, places in zip(needles.tokens, needles.places, strict=True):
        text = write.tokenizer.decode(tokens.tolist())
        digits = write.tokenizer.decode(tokens[places].tolist())
        assert len(digits) == 5 * asked and digits.isdecimal()
        for i in range(0, 5 * asked, 5):
            # once in its line, once in its answer
            assert text.count(digits[i : i + 5]) == 2
        assert text.endswith(digits[-5:])


def test_needles_stand_where_they_were_asked_to() -> None:
    write = writer(clear=200)
    for depth in (0.0, 0.5, 1.0):
        tokens, places = write.chat(1500, 1, 1, random.Random(1), depth)
        value = write.tokenizer.decode([tokens[p] for p in places])
        text = write.tokenizer.decode(tokens)
        share = text.index(value) / len(text)
        assert abs(share - depth * 0.8) < 0.2
    with pytest.raises(ConfigError, match="no room for 3 needles"):
        write.chat(300, 3, 1, random.Random(1))


def test_a_template_that_changes_messages_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not keep messages as they are"):
        writer("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")


def test_windows_ask_in_their_share_and_come_back_with_the_step() -> None:
    write = writer()
    plain = Windows(np.array(random_tokens(9000)), 1200, seed=0)
    windows = NeedleWindows(plain, write, share=0.5)
    batch = windows.batch(3, 4)
    assert batch.shape == (4, 1201)
    assert [(row < 0).any().item() for row in batch] == [True, True, False, False]
    assert torch.equal(batch, windows.batch(3, 4))
    assert torch.equal(batch[2:], plain.batch(3, 4)[2:])
    with pytest.raises(ConfigError, match=r"in 0\.\.1, got 2"):
        NeedleWindows(plain, write, share=2)


def test_no_model_is_measured_on_a_wording_that_it_was_trained_on() -> None:
    measured = set(WORDING.line.lower().split()) - {"the", "{name}", "{value}.", "with", "of"}
    for wording in WORDINGS:
        assert not measured & set(wording.line.lower().split())
    assert len(set(NAMES)) == len(NAMES)


def test_questions_are_the_same_for_every_model_and_clear_of_the_window() -> None:
    made = tokenizer(TEMPLATE)
    stream = np.array(
        made("one two three four five six. " * 300, add_special_tokens=False)["input_ids"]
    )  # type: ignore[operator]
    asked = questions(made, stream, lengths=(900,), keys=(1, 3), items=12)
    again = questions(made, stream, lengths=(900,), keys=(1, 3), items=12)
    assert sorted(asked) == [(900, 1), (900, 3)]
    for cell, needles in asked.items():
        assert torch.equal(needles.tokens, again[cell].tokens)
        for tokens, places in zip(needles.tokens, needles.places, strict=True):
            value = made.decode(tokens[places].tolist())  # type: ignore[attr-defined]
            before = made.decode(tokens[: places[0] - CLEAR].tolist())  # type: ignore[attr-defined]
            assert value in before


def test_an_answer_is_recalled_if_every_digit_is_the_likeliest() -> None:
    model = tiny_model("softmax", dtype=torch.float32)
    tokens = torch.tensor([random_tokens(40, seed) for seed in range(6)])
    places = torch.tensor([[20, 39]] * 6)
    with torch.no_grad():
        likeliest = model(tokens).argmax(-1)
        for row in (0, 2, 5):
            tokens[row, 39] = model(tokens[row : row + 1])[0, 38].argmax()
            tokens[row, 20] = likeliest[row, 19]
            tokens[row, 39] = model(tokens[row : row + 1])[0, 38].argmax()
        likeliest = model(tokens).argmax(-1)
    expected = (likeliest.gather(1, places - 1) == tokens.gather(1, places)).all(1)
    assert expected[[0, 2, 5]].all()
    for batch in (40, 100, 10_000):
        assert torch.equal(recalled(model, Needles(tokens, places), batch), expected)


# ---- agreement


def test_scores_are_those_of_all_logits_at_once() -> None:
    teacher, student = (tiny_model(name, seed=0) for name in ("softmax", "streaming"))
    windows = torch.tensor([random_tokens(30, seed) for seed in range(5)])
    with torch.no_grad():
        p, q = (m(windows[:, :-1]).float().log_softmax(-1) for m in (teacher, student))
    nats = -q.gather(2, windows[:, 1:, None]).mean()
    found = score(student, windows, teacher, rows=2)
    assert found.nats == pytest.approx(float(nats), abs=1e-5)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert score(teacher, windows).to_json()["top1"] == 1.0


def test_greedy_answers_are_equal_to_themselves_and_differ_where_they_do() -> None:
    model = tiny_model("softmax")
    prompts = [random_tokens(n, n) for n in (3, 9, 5)]
    answers = greedy(model, prompts, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = list(prompt)
        for token in answer.tolist():
            with torch.no_grad():
                assert token == int(model(torch.tensor([text]))[0, -1].argmax())
            text.append(token)
    assert equal_prefixes(model, prompts, answers).tolist() == [6, 6, 6]
    other = answers.clone()
    other[1, 2] = (other[1, 2] + 1) % VOCAB
    assert equal_prefixes(model, prompts, other).tolist() == [6, 2, 6]
    assert_close(other[0], answers[0])


def test_needles_apart_have_a_wording_each() -> None:
    write = writer()
    tokens, places = write.chat(1500, len(WORDINGS), len(WORDINGS), random.Random(0), apart=True)
    text = write.tokenizer.decode(tokens)
    assert len(places) == 5 * len(WORDINGS)
    for wording in WORDINGS:
        # what stands ahead of the name of each question
        assert text.count(wording.question.partition("{name}")[0]) == 1
    with pytest.raises(ConfigError, match="5 needles cannot have a wording each: there are 4"):
        write.chat(1500, 5, 1, random.Random(0), apart=True)
