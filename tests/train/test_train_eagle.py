"""EAGLE-style drafters in training: what is unrolled is what is served, place by place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise

from linspec.checkpoints.hub import load_model
from linspec.decoding.step import StepInput
from linspec.drafters.eagle import Eagle
from linspec.drafters.eagle_net import BOTH, EagleNet
from linspec.drafters.saved_packed import EAGLE
from linspec.mixers.ops.exact import capped
from linspec.models.decoder import Decoder
from linspec.train.drafters import DrafterConfig, train_drafter
from linspec.train.drafters.eagle import (
    EagleTraining,
    EagleTrainingOptions,
    Unroll,
    drafts_of,
    eagle_loss,
    fused_states,
    target_output,
)
from linspec.train.drafters.states import TargetStates, states_of

STEPS = 3


def make(
    model: Decoder, *, vocabulary: int = 40, normed: bool = True, own_head: bool = True
) -> EagleNet:
    options = EagleTrainingOptions(vocabulary=vocabulary, normed=normed, own_head=own_head)
    stream = np.random.default_rng(0).integers(0, 290, 4000)
    net = EagleTraining(options).make(model, stream, 0)
    return randomise(net, 1)


def some_states(model: Decoder, net: EagleNet, rows: int = 2, length: int = 14) -> TargetStates:
    ids = torch.randint(0, 290, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return states_of(model, ids, net.config.reads)


class Served:
    """One draft of a drafter, entry by entry, behind place t of a window."""

    def __init__(self, net: EagleNet, states: TargetStates, row: int, t: int) -> None:
        self.net, self.cache, self.depth = net, net.decoder.new_state(1), 0
        read = torch.cat([states.layers[layer][row, : t + 1] for layer in net.config.reads], -1)
        tokens = states.ids[row, 1 : t + 2].tolist()
        self._run(StepInput(0, tokens, embeddings=net.fused(read)))
        self.cache.commit(0, range(t + 1))

    def _run(self, given: StepInput) -> None:
        output = self.net.decoder.step([given], self.cache, want=BOTH)
        self.logits = output.logits[-1]
        self.state = self.net.fed_back(output.hidden[-1:], output.layers[0][-1:])

    def go_on(self, token: int) -> None:
        self.depth += 1
        self._run(StepInput(0, [token], [self.depth - 2], embeddings=self.state))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("own_head", [True, False])
@torch.no_grad()
def test_unrolled_logits_are_those_of_drafts(
    tiny_teacher: Callable[..., Decoder], normed: bool, own_head: bool
) -> None:
    model = tiny_teacher()
    net = make(model, normed=normed, own_head=own_head)
    states = some_states(model, net)
    unroll, total = Unroll(net, fused_states(net, states)), states.final.shape[1]
    logits = [net.decoder.head(unroll.step(states.ids[:, 1 + j : total])) for j in range(STEPS)]
    for row in range(len(states.ids)):
        for t in range(total - STEPS):
            served = Served(net, states, row, t)
            for j in range(STEPS):
                torch.testing.assert_close(served.logits, logits[j][row, t], rtol=0, atol=1e-5)
                served.go_on(int(states.ids[row, t + 2 + j]))


@torch.no_grad()
def test_the_loss_is_the_weighted_sum_of_cross_entropies(
    tiny_teacher: Callable[..., Decoder],
) -> None:
    model = tiny_teacher()
    net = make(model)
    states = some_states(model, net)
    drafted, total, expected = net.drafted.tolist(), states.final.shape[1], torch.zeros(())
    for j in range(STEPS):
        losses = []
        for row in range(len(states.ids)):
            for t in range(total - 1 - j):
                served = Served(net, states, row, t)
                for ahead in range(j):
                    served.go_on(int(states.ids[row, t + 2 + ahead]))
                # the target's choice behind the newest token that the entry holds
                if int(states.chosen[row, t + 1 + j]) in drafted:
                    whole = model.head(states.final[row, t + 1 + j])
                    wanted = whole[net.drafted.long()].softmax(-1)
                    losses.append(F.cross_entropy(served.logits, wanted))
        assert 0 < len(losses) < 2 * (total - 1 - j)
        expected += 0.8**j * torch.stack(losses).mean()
    torch.testing.assert_close(eagle_loss(net, states, STEPS, 0.8), expected)


def test_only_the_drafter_learns(tiny_teacher: Callable[..., Decoder]) -> None:
    model = tiny_teacher().requires_grad_(False)
    net = make(model)
    eagle_loss(net, some_states(model, net), STEPS, 0.8).backward()
    assert all(weight.grad is not None for weight in net.parameters())
    assert all(weight.grad is None for weight in model.parameters())


@torch.no_grad()
def test_drafts_of_all_places_are_drafts_one_by_one(tiny_teacher: Callable[..., Decoder]) -> None:
    model = tiny_teacher()
    net = make(model, vocabulary=30)
    states = some_states(model, net)
    found, total = drafts_of(net, states, 4, 5), states.final.shape[1]
    for row in range(len(states.ids)):
        for t in range(total - 1):
            served = Served(net, states, row, t)
            for depth in range(min(4, total - 1 - t)):
                best = net.drafted[served.logits.topk(5).indices].tolist()
                assert found[row, t, depth].tolist() == best
                served.go_on(best[0])


def test_a_new_drafter_says_what_the_target_says(tiny_teacher: Callable[..., Decoder]) -> None:
    model = tiny_teacher()
    options = EagleTrainingOptions(vocabulary=0)
    net = EagleTraining(options).make(model, np.zeros(0, dtype=np.int64), 0)
    assert net.config.vocabulary == model.config.vocab_size
    assert torch.equal(net.decoder.head.weight, model.head.weight)
    states = some_states(model, net)
    output = target_output(net)
    logits = capped(states.final @ output.weight.T, output.cap)
    torch.testing.assert_close(logits, model.head(states.final))


def test_a_trained_drafter_learns_loads_and_says_what_it_reads(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    config = DrafterConfig(
        tokens=40 * 256, context=64, batch_tokens=256, calibration_tokens=1024, precision="float32"
    )
    out = train_drafter(
        teacher_dir,
        tmp_path / "d",
        kind="eagle:vocabulary=60,depth=4",
        data=[corpus],
        config=config,
    )
    data = json.loads((out / "drafter.json").read_text())
    model = load_model(teacher_dir)
    net = EAGLE.load(out, model)
    assert data["kind"] == "eagle" and tuple(data["reads"]) == net.config.reads
    assert data["loss"] < np.log(60) * sum(0.8**j for j in range(3))
    assert 1 <= len(net.accuracies) <= 4 and 0 <= sum(net.accuracies[0]) <= 1
    assert data["drafts"] == 4 and 1 <= data["tokens_per_round"] <= 5
    assert Eagle(net, slots=1).needs.layers == net.config.reads
