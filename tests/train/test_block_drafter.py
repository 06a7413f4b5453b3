"""Block drafters in training: packed blocks are single blocks, losses are the paper's, calibration counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from linspec.checkpoints.hub import load_model
from linspec.drafters.block_net import BlockNet
from linspec.drafters.saved import load_drafter
from linspec.models.decoder import Decoder
from linspec.train.drafters import DrafterConfig, train_drafter
from linspec.train.drafters.block import (
    DISTANCE,
    SURE,
    TOKEN,
    anchors_of,
    block_logits,
    block_loss,
    block_states,
    calibrate,
    layers_read,
)
from linspec.train.drafters.calibration import (
    GRID,
    area_under_curve,
    calibration_error,
    conditional,
    reached_of,
    temperatures,
)
from linspec.train.drafters.states import TargetStates, states_of
from tests.block_drafters import SHAPE, VOCAB, make_net, make_target

SHORT = DrafterConfig(
    tokens=40 * 256,
    context=64,
    batch_tokens=256,
    lr=1e-2,
    calibration_tokens=512,
    precision="float32",
    save_every=0.0,
)


def some_states(target: Decoder, rows: int = 2, tokens: int = 21, seed: int = 0) -> TargetStates:
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return states_of(target, ids, SHAPE.read)


def one_block(net: BlockNet, states: TargetStates, row: int, anchor: int) -> torch.Tensor:
    """Logits [B, V] of a block by what a drafter keeps: the rows of the last `window` tokens."""
    first = max(0, anchor - net.config.window)
    read = [states.layers[layer][row : row + 1, :anchor] for layer in net.config.read]
    context = net.context(read)
    kept = net.rows(context[:, first:], torch.arange(first, anchor)[None])
    roots = net.embedded(states.ids[row, anchor])
    seen = torch.ones(1, 1, anchor - first, dtype=torch.bool)
    found = net.blocks(context[:, -1:], roots[None, None], torch.tensor([[anchor]]), kept, seen)
    before = states.ids[row, anchor : anchor + net.config.places]
    given = net.markov_in(net.embedded(before))
    return block_logits(net, found[0, 0], given, net.target_rows())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("window", [1, 6, 64])
def test_packed_blocks_are_blocks_one_at_a_time(depth: int, window: int) -> None:
    target = make_target().requires_grad_(False)
    net = make_net(target, replace(SHAPE, depth=depth, window=window))
    states = some_states(target)
    anchors = torch.arange(1, 17)
    found, _ = block_states(net, states, anchors)
    at = anchors[:, None] + torch.arange(4)
    given = net.markov_in(net.embedded(states.ids[:, at]))
    packed = block_logits(net, found, given, net.target_rows())
    for row in range(2):
        for i, anchor in enumerate(anchors.tolist()):
            alone = one_block(net, states, row, anchor)
            torch.testing.assert_close(packed[row, i], alone, rtol=1e-5, atol=1e-5)


def test_a_block_sees_nothing_behind_its_root() -> None:
    target = make_target().requires_grad_(False)
    net, states = make_net(target), some_states(make_target())
    before, _ = block_states(net, states, torch.tensor([7]))
    changed = {
        n: h.clone().index_fill_(1, torch.arange(7, 20), 9.0) for n, h in states.layers.items()
    }
    ids = states.ids.clone()
    ids[:, 8:] = 0
    after, _ = block_states(net, replace(states, layers=changed, ids=ids), torch.tensor([7]))
    assert torch.equal(before, after)


def test_the_loss_is_the_papers_weighted_sum() -> None:
    target = make_target().requires_grad_(False)
    net, states = make_net(target), some_states(target)
    rows, places, total = net.target_rows(), net.config.places, torch.zeros(())
    index = {int(token): place for place, token in enumerate(net.drafted)}
    anchors = anchors_of(states, places, 3).tolist()
    assert len(anchors) > 3 and min(anchors) >= 1 and max(anchors) <= 20 - places
    weights = [0.7**k for k in range(places)]
    for row in range(2):
        for anchor in anchors:
            logits = one_block(net, states, row, anchor)
            found, _ = block_states(net, states, torch.tensor([anchor]))
            for k in range(places):
                own = (rows @ states.final[row, anchor + k]).softmax(-1)
                share = logits[k].softmax(-1)
                far = (share - own).abs().sum()
                given = net.markov_in(net.embedded(states.ids[row, anchor + k]))
                sure = net.sureness(found[row, 0, k], given).sigmoid()
                label = index.get(int(states.chosen[row, anchor + k]))
                right = net.drafted[logits[k].argmax()] == states.chosen[row, anchor + k]
                part = SURE * F.binary_cross_entropy(sure, right.float())
                if label is not None:
                    part = part - TOKEN * share[label].log() + DISTANCE * far
                total += weights[k] * part
    expected = total / (2 * len(anchors)) / sum(weights)
    torch.testing.assert_close(block_loss(net, states, every=3, decay=0.7), expected)


def test_the_loss_teaches_the_drafter_alone() -> None:
    target = make_target().requires_grad_(False)
    net = make_net(target).requires_grad_(True)
    block_loss(net, some_states(target), every=2, decay=0.8).backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for p in net.parameters())


def test_an_untrained_drafter_can_learn_everywhere() -> None:
    target = make_target().requires_grad_(False)
    net = make_net(target).requires_grad_(True)
    states = some_states(target)
    net.initialize(torch.Generator().manual_seed(0), [states.layers[n] for n in SHAPE.read])
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = block_loss(net, states, every=1, decay=0.8)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert losses[-1] < 0.7 * losses[0]


def test_acceptance_is_what_serving_the_drafter_would_count() -> None:
    """Walk by hand: rounds of a text that the target itself wrote in part."""
    target = make_target().requires_grad_(False)
    net = make_net(target)
    rng = np.random.default_rng(0)
    stream = rng.integers(0, VOCAB, 40)
    # the target's own text for a while, so that later places can be judged
    text = torch.from_numpy(stream)[None]
    with torch.inference_mode():
        for at in range(8, 30):
            text[0, at] = target.head(target.hidden(text[:, :at]))[0, -1].argmax()
        net.drafted[:] = torch.cat((text[0, 8:29].unique(), torch.arange(70)))[:21].sort()[0].int()
        states = states_of(target, text, SHAPE.read)
        hits, tried, anchor = [0] * 4, [0] * 4, 0
        while (anchor := anchor + 1) < 36:
            token = states.ids[0, anchor]
            if token != states.chosen[0, anchor - 1]:
                continue
            roots = net.embedded(token)
            found, _ = block_states(net, states, torch.tensor([anchor]))
            logits = found[0, 0] @ net.target_rows().T
            for k in range(4):
                before = net.markov_in(net.embedded(token)) if k else net.markov_in(roots)
                token = net.drafted[(logits[k] + net.markov_out(before)).argmax()].long()
                tried[k] += 1
                right = bool(token == states.chosen[0, anchor + k])
                hits[k] += right
                if not right or token != states.ids[0, anchor + k + 1]:
                    break
            # the root of the next round stands behind the last draft that was right
            anchor += k + right
    measured = calibrate(target, net, text[0].numpy(), context=40, tokens=40)
    assert hits[1] > 0
    assert measured.acceptance == pytest.approx(
        [h / t if t else 0.0 for h, t in zip(hits, tried, strict=True)], abs=1e-5
    )


def test_temperatures_make_confident_guesses_honest() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 3, generator=generator) + 0.5
    true = torch.tensor([2.0, 0.7, 1.3])
    right = torch.rand(20_000, 3, generator=generator) < (logits / true).sigmoid()
    survived = right.cumprod(1).bool()
    known = torch.ones_like(survived)
    found = temperatures(known, survived, logits)
    assert found == pytest.approx(true.tolist(), rel=0.15)
    product = (logits / torch.tensor(found)).sigmoid().cumprod(1)
    assert all(calibration_error(product[:, k], survived[:, k]) < 0.02 for k in range(3))


def test_confidence_that_is_honest_has_no_calibration_error() -> None:
    sure = torch.tensor([0.25] * 4 + [0.75] * 4)
    right = torch.tensor([True, False, False, False, True, True, True, False])
    assert calibration_error(sure, right) == pytest.approx(0.0, abs=1e-6)
    assert calibration_error(1 - sure, right) == pytest.approx(0.5)
    assert calibration_error(sure[:0], right[:0]) == 0.0


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_area_under_curve_is_the_share_of_pairs(cases: list[tuple[int, bool]]) -> None:
    sure, right = torch.tensor([c[0] for c in cases]), torch.tensor([c[1] for c in cases])
    pairs = [(a > b) + 0.5 * (a == b) for a, x in cases if x for b, y in cases if not y]
    expected = sum(pairs) / len(pairs) if pairs else 0.5
    assert area_under_curve(sure, right) == pytest.approx(expected)


def test_a_place_counts_only_once_those_before_it_are_right() -> None:
    survived = torch.tensor([[True, True], [True, False], [False, False], [True, False]])
    known = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    assert conditional(reached_of(known, survived), survived) == pytest.approx([0.75, 0.5])


def test_the_layers_that_are_read_exist_and_differ() -> None:
    assert layers_read(30) == (1, 14, 26)
    for layers in range(1, 40):
        read = layers_read(layers)
        assert list(read) == sorted({*read}) and read[0] >= 0 and read[-1] < layers


def test_a_trained_drafter_loads_with_what_was_measured(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    kind = "block:vocabulary=40,places=3,depth=1,window=16,rank=8"
    out = train_drafter(teacher_dir, tmp_path / "d", kind=kind, data=[corpus], config=SHORT)
    net = load_drafter(out, load_model(teacher_dir), BlockNet)
    assert len(net.measured.acceptance) == 3
    assert all(t in GRID for t in net.measured.temperatures)
    assert len(net.measured.auc) == len(net.measured.ece) == 3
    described = json.loads((out / "drafter.json").read_text())
    assert described["drafts"] == 3
    assert described["tokens_per_round"] == pytest.approx(1 + net.measured.gains[-1], abs=1e-3)
    assert net.config.layout == "shift" and net.config.places == 3
