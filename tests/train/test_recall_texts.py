"""Texts that ask for what stood above: every answer asked for stands there, and resuming is exact."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from linspec.errors import ConfigError
from linspec.train.data import Windows
from linspec.train.recall_texts import CUES, LineWriter, RecallWindows, cue_for, with_recall


@pytest.fixture
def windows() -> Windows:
    return Windows(np.zeros(5000, dtype=np.int32), 600, 7)


def test_lines_are_asked_again_with_the_same_answer(
    windows: Windows, tokenizer: PreTrainedTokenizerFast
) -> None:
    asking = with_recall(windows, tokenizer, ["book.txt"], 1.0)
    batch = asking.batch(3, 4)
    assert batch.shape == (4, 601)
    texts = [re.sub(r"<\|endoftext\|>", "", t) for t in tokenizer.batch_decode(batch)]
    names: list[str] = []
    for text in texts:
        # a line that a passage or the end of the text cuts short has no end of its own
        lines = re.findall(r"\nThe (\w+_\w+) is (\d{6}|[a-z]{6})(?=\n)", text)
        answers: dict[str, set[str]] = {}
        for name, answer in lines:
            answers.setdefault(name, set()).add(answer)
        assert len(lines) > len(answers) > 1
        assert all(len(found) == 1 for found in answers.values())
        names += answers
    assert len(set(names)) == len(names)
    assert torch.equal(asking.batch(3, 4), batch)
    assert not torch.equal(asking.batch(4, 4), batch)


def test_the_share_holds_in_the_mean_and_the_rest_is_text(
    windows: Windows, tokenizer: PreTrainedTokenizerFast
) -> None:
    asking = with_recall(windows, tokenizer, ["book.txt"], 0.3)
    # the stream is all end of text, so a window with anything else is one that asks
    counts = [int((asking.batch(step, 4, 300) != 0).any(1).sum()) for step in range(200)]
    assert set(counts) == {1, 2}
    assert sum(counts) / 800 == pytest.approx(0.3, abs=0.02)
    assert with_recall(windows, tokenizer, ["book.txt"], 0.0) is windows


def test_a_share_above_one_is_refused(windows: Windows, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="recall_share must be in 0..1, got 2"):
        RecallWindows(windows, LineWriter(tokenizer, CUES["code"]), 2)


def test_code_and_prose_have_their_own_cue() -> None:
    assert cue_for(["stdlib"]) == cue_for([Path("stdlib")]) == CUES["code"]
    assert cue_for(["stdlib", "book.txt"]) == CUES["prose"]
