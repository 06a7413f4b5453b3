"""A task whose answers are lines of different lengths in far more masks: where blocks and texts end matters.

A prompt is three groups of digits, and the answer the running sums of each, a line for a group. Ends of text
fill what is left of the masks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.diffusion_work import Answer, Work, kept_model
from linspec.decoding.sampling import SamplingParams
from linspec.evaluate.parallel_forms import Digits
from linspec.evaluate.parallel_models import masked_rows, train_by_masks
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion

BASE, GROUPS, LONGEST, MASKS = 5, 3, 6, 48
BREAK, NOTHING, EQUALS, END, MASK = range(BASE, BASE + 5)
_ROOM = GROUPS * (LONGEST + 1)
_PROMPT = _ROOM + 1
Groups = list[list[int]]


def draw(rng: random.Random) -> Groups:
    """Digits of each line."""
    return [[rng.randrange(BASE) for _ in range(rng.randint(1, LONGEST))] for _ in range(GROUPS)]


def prompt_of(groups: Groups) -> list[int]:
    """Groups, each with a line break, at the places that their lines will have in the answer."""
    text = [token for digits in groups for token in (*digits, BREAK)]
    return [*text, *[NOTHING] * (_ROOM - len(text)), EQUALS]


def answer_of(groups: Groups) -> list[int]:
    """Lines of running sums."""
    return [token for digits in groups for token in (*_sums(digits), BREAK)]


def _sums(digits: Sequence[int]) -> list[int]:
    return [sum(digits[: end + 1]) % BASE for end in range(len(digits))]


class Lines(Work):
    """Right is what has the right lines and ends behind them."""

    name, quality = "lines", "right"
    blocks = ("fixed:none",)

    def __init__(self, folder: Path, count: int, steps: int) -> None:
        rng = random.Random("asked")
        self.asked = [draw(rng) for _ in range(count)]
        self.model = kept_model(folder / f"lines-model-{steps}", lambda: _trained(steps))
        self.tokenizer = Digits()
        self.prompts = [prompt_of(groups) for groups in self.asked]
        self.params = [SamplingParams(max_tokens=MASKS)] * count

    def judged(
        self, answers: Sequence[Answer], reference: Sequence[Answer] | None
    ) -> dict[str, float]:
        texts = [_text(each) for each in answers]
        right = [text == answer_of(each) for text, each in zip(texts, self.asked, strict=True)]
        found = {"right": sum(right) / len(right)}
        if reference is not None:
            pairs = zip(texts, reference, strict=True)
            found["identical"] = sum(text == _text(other) for text, other in pairs) / len(right)
        return found


def _text(answer: Answer) -> list[int]:
    ids = list(answer.ids)
    return ids[: ids.index(END)] if END in ids else ids


def _trained(steps: int) -> MaskedDiffusion:
    model = MaskedDiffusion(
        DiffusionConfig(
            vocab_size=MASK + 1,
            mask_id=MASK,
            eos_ids=(END,),
            width=64,
            layers=3,
            heads=4,
            kv_heads=4,
            head_width=16,
            mlp_width=128,
            max_positions=_PROMPT + MASKS,
        )
    )
    return train_by_masks(model, _batches(64), steps)


def _batches(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Answers with any number of ends behind them: a canvas that is cut must look like these."""
    rng, generator = random.Random("learned"), torch.Generator().manual_seed(0)
    while True:
        rows = []
        for _ in range(count):
            groups = draw(rng)
            answer = answer_of(groups)
            ends = rng.randint(1, MASKS - len(answer))
            rows.append(torch.tensor([*prompt_of(groups), *answer, *[END] * ends]))
        yield masked_rows(rows, _PROMPT, generator)
