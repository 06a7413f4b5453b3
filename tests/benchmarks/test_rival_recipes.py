"""The rivals' recipes on a random model of two layers: what each trains, and what it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import full_logits, random_tokens, tiny_config

from benchmarks import rival_recipes
from benchmarks.rival_recipes import RECIPES, exact_heads_of, make_student, train
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.train.data import Windows

HEADS = ((0,), (0, 1))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_its_own_weights_and_leaves_the_teacher(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival_recipes, "CONTEXT", 160)
    tiny = tiny_config(MixerConfig(), MixerConfig(), max_positions=512)
    config = replace(tiny, width=64, head_width=32, mlp_width=64)
    teacher = Decoder(config).requires_grad_(False)
    before = full_logits(teacher, [random_tokens(150)])
    student = make_student(teacher, RECIPES[name], HEADS)
    assert exact_heads_of(student) == HEADS
    frozen = RECIPES[name].frozen
    kept = {k: v.clone() for k, v in student.named_parameters() if frozen and k.endswith(frozen)}
    stream = np.array(random_tokens(4000), dtype=np.uint16)
    train(teacher, student, RECIPES[name], Windows(stream, 160, 0), 4 * 2 * 160, tmp_path)
    after = dict(student.named_parameters())
    assert all(torch.equal(after[k], v) for k, v in kept.items())
    assert any(v.requires_grad for v in after.values())
    assert torch.equal(full_logits(teacher, [random_tokens(150)]), before)
    assert bool(full_logits(student, [random_tokens(150)]).isfinite().all())
