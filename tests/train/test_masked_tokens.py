"""Windows with hidden tokens: what is hidden, what it costs, and that the loss is the published bound."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.train.data import Windows
from linspec.train.masked_tokens import MaskedWindows, masked_loss
from tests.diffusion_tasks import MASK, untrained

STREAM = np.arange(500, dtype=np.int32) % 11


def _windows(seed: int = 0) -> MaskedWindows:
    return MaskedWindows(Windows(STREAM, 32, seed))


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 32))
def test_each_row_hides_a_token_and_shows_the_text_of_its_window(
    step: int, rows: int, context: int
) -> None:
    batch = _windows().batch(step, rows, context)
    assert batch.shape == (rows, context)
    assert (batch < 0).any(1).all()
    shown = torch.where(batch < 0, -1 - batch, batch)
    assert torch.equal(shown, Windows(STREAM, 32, 0).batch(step, rows, context)[:, 1:])


def test_a_resumed_run_hides_the_same_tokens() -> None:
    assert torch.equal(_windows().batch(7, 4), _windows().batch(7, 4))
    assert not torch.equal(_windows().batch(7, 4), _windows().batch(8, 4))


def test_any_number_of_tokens_is_hidden_and_half_of_the_windows_begin_with_a_prompt() -> None:
    batches = torch.cat([_windows().batch(step, 16) for step in range(200)]) < 0
    first = batches.int().argmax(1)
    counts = batches.sum(1)
    assert counts.min() == 1 and counts.max() == 32
    # of the windows without a prompt every count is as likely: half hide more than half of the tokens
    assert 0.2 < (counts > 16).double().mean() < 0.45
    assert 0.15 < (first > 12).double().mean() < 0.5


@pytest.mark.parametrize("shift", [0, 1])
def test_the_loss_is_the_mean_over_rows_of_the_mean_over_hidden_tokens(shift: int) -> None:
    model = _model(shift)
    batch = _windows().batch(3, 4)
    wanted = []
    for row in batch:
        ids = [int(-1 - t) if t < 0 else int(t) for t in row]
        given_ids = torch.tensor([[MASK if t < 0 else int(t) for t in row]])
        logits = model(given_ids)[0].log_softmax(-1)
        at = [i for i, t in enumerate(row) if t < 0]
        wanted.append(-sum(logits[max(i - shift, 0), ids[i]] for i in at) / len(at))
    torch.testing.assert_close(masked_loss(model, batch), torch.stack(wanted).mean())


@torch.no_grad()
def test_the_loss_was_no_bound_on_the_likelihood_of_the_text() -> None:
    """For 4 tokens all masks can be counted: hidden count uniform, all sets of a count as likely."""
    model, text = _model(0), torch.tensor([[3, 1, 4, 1]])
    terms = []
    for count in range(1, 5):
        sets = list(combinations(range(4), count))
        losses = []
        for hidden in sets:
            marked = text.clone()
            marked[0, list(hidden)] = -1 - text[0, list(hidden)]
            losses.append(masked_loss(model, marked))
        terms.append(torch.stack(losses).mean())
    exact = torch.stack(terms).mean()
    # the same by the shares of the published loss, integrated by the midpoint rule
    published = torch.zeros((), dtype=torch.float64)
    shares = (torch.arange(400) + 0.5) / 400
    for count in range(1, 5):
        weight = (shares**count * (1 - shares) ** (4 - count) / shares).mean()
        for hidden in combinations(range(4), count):
            given_ids = text.clone()
            given_ids[0, list(hidden)] = MASK
            nats = F.cross_entropy(model(given_ids)[0], text[0], reduction="none")
            published += weight * nats[list(hidden)].sum() / 4
    assert exact.item() == pytest.approx(published.item(), rel=0.01)


def _model(shift: int) -> MaskedDiffusion:
    plain = untrained(width=32)
    torch.manual_seed(1)
    return MaskedDiffusion(replace(plain.config, logit_shift=shift)).double().eval()
