"""Sums that harm beyond the trained length are left out, those that help stay."""

from __future__ import annotations

import numpy as np
import torch

from linspec.mixers.config import MixerConfig
from linspec.train.data import Windows
from linspec.train.finetune import finetune_loss
from linspec.train.sums import alphas, keep_useful_sums
from tests.helpers import VOCAB, tiny_model

CONTEXT = 24


def windows() -> Windows:
    stream = np.random.default_rng(0).integers(0, VOCAB, 4000).astype(np.int32)
    return Windows(stream, CONTEXT, 0)


def student(kernel: str = "softmax") -> torch.nn.Module:
    mixer = MixerConfig(name="grouped", group=4, span=2, kernel=kernel)
    return tiny_model(mixer, mixer, dtype=torch.float32)


def moved(model: torch.nn.Module, step: float) -> list[float]:
    """α a little away from 0, along the gradient of the loss of the texts that are measured."""
    for alpha in alphas(model):
        alpha.data.zero_()
    finetune_loss(model, windows().batch(0, 4, 4 * CONTEXT)).backward()
    for alpha in alphas(model):
        alpha.data.copy_(step * alpha.grad.sign())
    return [alpha.item() for alpha in alphas(model)]


def test_a_sum_that_harms_beyond_the_trained_length_is_left_out() -> None:
    model = student()
    assert all(moved(model, 1e-4))
    report = keep_useful_sums(model, windows())
    assert report is not None and not report.kept
    assert report.long_without <= report.long_with_sums
    assert all(alpha.item() == 0 for alpha in alphas(model))


def test_a_sum_that_helps_on_long_texts_stays_as_it_was() -> None:
    model = student()
    before = moved(model, -1e-4)
    report = keep_useful_sums(model, windows())
    assert report is not None and report.kept and report.long_with_sums < report.long_without
    assert [alpha.item() for alpha in alphas(model)] == before


def test_without_sums_or_with_the_published_weights_nothing_is_measured() -> None:
    texts = windows()
    assert keep_useful_sums(student("own"), texts) is None
    untouched = student()
    for alpha in alphas(untouched):
        alpha.data.zero_()
    assert keep_useful_sums(untouched, texts) is None
