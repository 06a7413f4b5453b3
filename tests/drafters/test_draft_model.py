"""A second model that drafts: its own limits, and whether it speaks the same language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import MERGES, model_dir, text_model, tiny_tokenizer
from helpers import random_tokens, tiny_model
from test_engine import decode, outputs
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from linspec.checkpoints.hub import save_model
from linspec.checkpoints.same_tokenizer import difference
from linspec.checkpoints.tokenizer import load_text_tokenizer
from linspec.decoding.sampling import SamplingParams
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.draft_model import DraftModel, Student
from linspec.errors import DrafterError
from linspec.llm import LLM


@pytest.mark.crossed(2)
@pytest.mark.parametrize("length", [3, 17, 18, 19, 20, 21, 30])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_at_its_last_position_once_ended_the_request(
    length: int, temperature: float
) -> None:
    target, small = tiny_model("aug"), tiny_model("softmax", seed=0, max_positions=20)
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=1)
    prompts = [random_tokens(length, seed=5), random_tokens(2, seed=6)]
    rows = decode(target, prompts, params, DraftModel(small, target.config, 4))
    assert [row.emitted for row in rows] == [30, 30]
    # it drafted while it could
    assert all(bool(row.stats.drafted) == (row.prompt_length < 20) for row in rows)
    if temperature == 0:
        assert outputs(rows) == outputs(decode(target, prompts, params))


def test_a_round_that_is_proposed_again_is_proposed_alike() -> None:
    target = tiny_model("aug")
    drafter = DraftModel(tiny_model("softmax", seed=9), target.config, 4)

    class Twice(DraftModel):
        def propose(self, rows: Any, budgets: Any) -> Any:
            first = super().propose(rows, budgets)
            again = [
                tree
                for row, budget in zip(rows, budgets, strict=True)
                for tree in super(Twice, self).propose([row], [budget])
            ]
            assert [tree.tokens for tree in first] == [tree.tokens for tree in again]
            return first

    params = [SamplingParams(max_tokens=20, temperature=1.0, seed=s) for s in range(4)]
    prompts = [random_tokens(n, seed=n) for n in (1, 5, 9, 14)]
    once = outputs(decode(target, prompts, params, drafter))
    assert outputs(decode(target, prompts, params, Twice(drafter.model, target.config, 4))) == once


def other_tokenizer(
    merges: list[tuple[str, str]] = MERGES, *, turned: bool = False, eos: str = "<|eos|>"
) -> PreTrainedTokenizerFast:
    """As large as the tiny one; with other merges, other numbers, or another special token."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    symbols = [eos, *(reversed(symbols) if turned else symbols)]
    tokenizer = Tokenizer(BPE({s: i for i, s in enumerate(symbols)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


OTHERS = {
    "numbers": (lambda: other_tokenizer(turned=True), "is token"),
    "merges": (lambda: other_tokenizer(MERGES[:-1][::-1] + MERGES[-1:]), "by other rules"),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", ["draft-model", "student"])
def test_a_draft_model_with_another_tokenizer_of_the_same_size_was_once_accepted(
    what: str, name: str, tmp_path: Path
) -> None:
    make, message = OTHERS[what]
    folder = save_model(text_model("aug"), make(), tmp_path / "other")
    with pytest.raises(DrafterError, match=f"another tokenizer than its target: .*{message}"):
        LLM(model_dir("aug"), drafter=f"{name}:{folder}", policy=4)
    source = model_dir("softmax")
    with pytest.raises(DrafterError, match="another tokenizer"):
        make_drafter(f"{name}:{folder}", DrafterContext(text_model("softmax"), source=source))


def test_the_same_tokenizer_is_the_same_however_it_was_read() -> None:
    read = load_text_tokenizer(model_dir("aug"))
    assert difference(tiny_tokenizer(), read) is difference(read, other_tokenizer()) is None
    # a chat model and its base
    assert difference(tiny_tokenizer(), other_tokenizer(eos="<|end of turn|>")) is None
    # one that says nothing about itself
    assert difference(tiny_tokenizer(), object()) is None


def test_a_student_that_kept_some_exact_heads_was_once_refused() -> None:
    teacher, student = tiny_model("softmax", "softmax"), tiny_model("by-head", "aug", seed=3)
    drafter = Student(student, teacher.config, 4)
    prompts = [random_tokens(n, seed=n) for n in (3, 30)]
    params = SamplingParams(max_tokens=20)
    expected = outputs(decode(teacher, prompts, params))
    assert outputs(decode(teacher, prompts, params, drafter)) == expected
    with pytest.raises(DrafterError, match="1 heads of the student see all tokens, and 1 of its"):
        Student(student, tiny_model("by-head", "aug").config, 4)


def test_a_draft_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    folder = save_model(text_model("aug"), None, tmp_path / "bare")
    with pytest.raises(Exception, match="no tokenizer in"):
        LLM(model_dir("aug"), drafter=f"draft-model:{folder}", policy=4)
