"""Gates, the KL in pieces, low-rank changes: what linearizing with exact heads is made of."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GROUP, assert_close, mixer_config, random_tokens, tiny_model

from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.mixers.exact_heads import by_head_mixers
from linspec.models.decoder import Decoder
from linspec.train.data import Windows
from linspec.train.exact_heads import exact_student, match_teacher
from linspec.train.gates import (
    GateConfig,
    gated_student,
    top_heads,
    train_gates,
)
from linspec.train.loop import TrainConfig, mean_loss
from linspec.train.low_rank import add_low_rank, factors, merge_low_rank
from linspec.train.match_teacher import KlLoss
from linspec.train.needles import Needles
from linspec.train.pieces import kl_of_states
from linspec.train.student import sharing, with_mixers

STREAMING = mixer_config("streaming")
RANKS = {"v": 2, "o": 2, "up": 1}


def teacher(layers: int = 2) -> Decoder:
    return tiny_model(*(["softmax"] * max(2, layers))).requires_grad_(False)


def ids(rows: int = 2, length: int = 4 * GROUP) -> torch.Tensor:
    return torch.tensor([random_tokens(length, seed) for seed in range(rows)])


# ---- the loss


def test_marked_answers_count_again() -> None:
    model = teacher()
    student = with_mixers(model, (STREAMING, STREAMING)).double().requires_grad_(False)
    batch = ids()
    marked = batch.clone()
    marked[0, 5:8] = -1 - batch[0, 5:8]
    plain = KlLoss(model, student, answers=0.0)(batch)
    assert_close(KlLoss(model, student, answers=0.0)(marked), plain)
    wanted, given = (m.hidden(batch[:, :-1])[0, 4:7] for m in (model, student))
    more = kl_of_states(given, wanted, student.head, model.head)
    assert_close(KlLoss(model, student, answers=2.0)(marked), plain + 2 * more)
    assert more > 1e-4


# ---- gates


@pytest.mark.parametrize(("gate", "mixer"), [(1.0, "softmax"), (0.0, "streaming")])
def test_a_gate_at_its_bound_is_the_mixer_itself(gate: float, mixer: str) -> None:
    model = teacher()
    student = gated_student(model, STREAMING).double()
    with torch.no_grad():
        for block in student.layers:
            block.mixer.get_parameter("gate").fill_(gate)
    settings = MixerConfig() if mixer == "softmax" else STREAMING
    expected = with_mixers(model, (settings, settings)).double()
    assert_close(student(ids()), expected(ids()))


def test_heads_gated_open_are_those_that_stay_exact() -> None:
    model = teacher()
    student = gated_student(model, STREAMING).double()
    values = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    with torch.no_grad():
        for block, row in zip(student.layers, values, strict=True):
            block.mixer.get_parameter("gate").copy_(row)
    heads = top_heads(values, 1)
    assert heads == ((0,), ())
    mixers = by_head_mixers(model.config, STREAMING, heads)
    assert [m.name for m in mixers] == ["by-head", "streaming"]
    assert_close(student(ids()), with_mixers(model, mixers).double()(ids()))


def test_all_heads_exact_are_the_teacher() -> None:
    model = teacher()
    mixers = by_head_mixers(model.config, STREAMING, ((0, 1), (0, 1)))
    assert [mixer.name for mixer in mixers] == ["softmax", "softmax"]
    by_head = replace(STREAMING, name="by-head", exact_heads=(0, 1))
    student = with_mixers(model, (by_head, by_head)).double()
    assert_close(student(ids()), model(ids()))


def test_an_untrained_student_has_the_tensors_of_its_teacher() -> None:
    model = teacher()
    student = exact_student(model, ((1,), ()), STREAMING)
    for name, weight in model.state_dict().items():
        assert student.state_dict()[name].data_ptr() == weight.data_ptr()
    with pytest.raises(ConfigError, match=r"weights of their own, blocks\.0\.mixer\.taps first"):
        sharing(model, (replace(STREAMING, taps=3),) * 2)


def test_training_leaves_the_teacher_and_its_projections_alone(tmp_path: Path) -> None:
    model = teacher()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    student = exact_student(model, ((1,), ()), STREAMING)
    windows = Windows(np.array(random_tokens(4000)), 40, seed=0)
    add_low_rank(student, RANKS, seed=0)
    config = TrainConfig(steps=200, lr=0.003, precision="float32", compile="off", log_every=1)
    log = match_teacher(model, student, windows, config, tmp_path, rows=4, label="t")
    assert mean_loss(log, 40) < 0.9 * mean_loss(log[:20], 20)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    merged = merge_low_rank(student).state_dict()
    for name, weight in before.items():
        frozen = name.rsplit(".", 2)[-2] not in RANKS
        assert torch.equal(merged[name], weight) is frozen


def test_gates_come_down_to_each_share_and_the_useful_head_stays() -> None:
    """Only KV head 1 of layer 0 of this teacher looks far: its values alone reach the output."""
    model = teacher()
    with torch.no_grad():
        model.layers[1].mixer.o.weight.zero_()
        model.layers[0].mixer.o.weight[:, :8].zero_()
    rng = random.Random(0)

    def batch(step: int) -> Needles:
        tokens = torch.tensor([random_tokens(6 * GROUP, rng.randrange(2**20)) for _ in range(4)])
        return Needles(tokens, torch.full((4, 1), 6 * GROUP - 1))

    said: list[str] = []
    config = GateConfig(counts=(2, 1), settle=5, every=5, weight=0.01, growth=2.0, lr=0.1)
    found = train_gates(model, gated_student(model, STREAMING).double(), batch, config, said.append)
    assert list(found) == [2, 1]
    assert all(gates.reached for gates in found.values())
    assert found[1].heads == ((1,), ())
    assert found[1].weight >= found[2].weight > 0.01
    assert said


def test_gates_that_run_out_of_steps_say_so() -> None:
    model = teacher()
    batch = Needles(ids(), torch.full((2, 1), 9))
    config = GateConfig(counts=(2, 1), steps=2)
    found = train_gates(model, gated_student(model, STREAMING), lambda step: batch, config)
    assert [gates.reached for gates in found.values()] == [False, False]


@pytest.mark.parametrize("counts", [(), (1, 2), (2, 2)])
def test_counts_must_fall(counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="counts must fall"):
        GateConfig(counts=counts)


@pytest.mark.parametrize("count", [0, 5])
def test_a_count_of_heads_that_a_model_has_not_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to 4 of this model, got {count}"):
        top_heads(torch.ones(2, 2), count)


def test_gates_need_plain_softmax() -> None:
    with pytest.raises(ConfigError, match="plain softmax"):
        gated_student(tiny_model("softmax", "aug"), STREAMING)


# ---- low-rank changes


def test_a_low_rank_change_starts_as_nothing_and_merges_into_the_same_model() -> None:
    model = tiny_model("softmax", "softmax")
    before = model(ids()).detach()
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_low_rank(model, RANKS, seed=0)
    assert_close(model(ids()), before)
    named = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(named) == 2 * 2 * 3
    assert all(".mixer.q" not in name and ".mixer.k" not in name for name in named)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    changed, delta = model(ids()).detach(), factors(model)
    assert float((changed - before).abs().max()) > 1e-3
    merge_low_rank(model)
    assert_close(model(ids()), changed)
    for name, (up, down) in delta.items():
        expected = frozen[f"{name}.weight"] + up @ down
        assert_close(model.get_parameter(f"{name}.weight"), expected)
    assert sorted({name.rsplit(".", 1)[1] for name in delta}) == ["o", "up", "v"]


def test_a_rank_that_is_too_large_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rank 17 is more than blocks.0.mixer.v"):
        add_low_rank(tiny_model("softmax", "softmax"), {"v": 17}, seed=0)


def test_only_marked_places_of_the_stream_are_negative() -> None:
    needles = Needles(torch.tensor(np.arange(12).reshape(2, 6)), torch.tensor([[1], [4]]))
    assert needles.marked().tolist() == [[0, -2, 2, 3, 4, 5], [6, 7, 8, 9, -11, 11]]
