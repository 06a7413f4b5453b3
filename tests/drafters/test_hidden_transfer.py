"""Pseudo states go through the upper layers, change nothing that is verified, and guess what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from copying import copying, periodic
from helpers import assert_close, feed, random_tokens, randomise, remembered, tiny_model

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput, Want
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.hidden_transfer import HiddenTransfer, TransferConfig, TransferMaps, entering
from linspec.drafters.saved import load_drafter, save_drafter
from linspec.engine.engine import Engine
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.policies.fixed import Fixed
from linspec.train.drafters import TRAININGS
from linspec.train.drafters.chains import upper_hidden
from linspec.train.drafters.hidden_transfer import calibrate
from linspec.train.drafters.states import states_of
from linspec.verifiers import LosslessVerifier

SURE = [[1.0], [1.0], [1.0]]
MIXERS = ["softmax", "window", "aug", "gla"]


def maps_of(
    model: Decoder, accuracies: Sequence[Sequence[float]] = SURE, *, rooted: bool = True
) -> TransferMaps:
    shape = TransferConfig(
        width=model.config.width,
        vocab_size=model.config.vocab_size,
        steps=len(accuracies),
        rooted=rooted,
    )
    maps = TransferMaps(shape, model, accuracies)
    maps.initialize()
    return maps.to(model.dtype)


def decoded(
    model: Decoder, drafter: HiddenTransfer | None, prompts: Sequence[list[int]]
) -> tuple[list[RunningSequence], Engine]:
    engine = Engine(model, verifier=LosslessVerifier(), drafter=drafter, policy=Fixed(9))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for prompt in prompts:
        engine.add(Request(tuple(prompt), params))
    found = {}
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            if outcome.finished:
                found[outcome.sequence.request] = outcome.sequence
    return [found[request] for request in sorted(found)], engine


def test_a_certain_text_is_drafted_as_deep_as_there_are_pseudo_tokens() -> None:
    model = copying()
    text = [periodic(11, seed) for seed in range(3)]
    plain, _ = decoded(model, None, text)
    found, _ = decoded(model, HiddenTransfer(maps_of(model)), text)
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert all(each.stats.tokens_per_round > 3.5 for each in found)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_training_sees_what_serving_computes(mixer: str, positions: str) -> None:
    """And the state of the target is what it was before a draft."""
    model = tiny_model(mixer, mixer, mixer, positions=positions)
    maps, ids = randomise(maps_of(model), 3), random_tokens(10)
    drafter, state = HiddenTransfer(maps), model.new_state(2)
    feed(model, state, random_tokens(4, seed=5), 0)
    output = model.step([StepInput(1, ids[:9])], state, want=Want((0,)))
    state.commit(1, range(9))
    before = [
        {name: each.clone() for name, each in part.items()} for part in remembered(model, state, 1)
    ]
    drafter.attached(Target(model, state))
    sequence = RunningSequence(1, None, ids, 9, slot=1)  # type: ignore[arg-type]  # not asked
    sequence.hidden = {0: output.layers[0]}
    served = drafter._scores([sequence], 3)[0]
    text = states_of(model, torch.tensor([ids]), (0,)).layers[0]
    pseudo = maps(text[:, -1], torch.tensor([ids[-1]]))
    with torch.no_grad():
        assert_close(served, model.head(upper_hidden(model, text, pseudo, first=1))[0])
    for one, other in zip(before, remembered(model, state, 1), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    (tree,) = drafter.propose([sequence], [Budget.of(3)])
    assert tree.tokens == (ids[-1], *served.argmax(-1).tolist())


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize("rooted", [False, True])
def test_calibration_equals_a_brute_force_count(mixer: str, rooted: bool) -> None:
    model, stream = tiny_model(mixer), np.random.default_rng(0).integers(0, 31, 60)
    maps = randomise(maps_of(model, [[], []], rooted=rooted), 2)
    counted = calibrate(maps, stream, context=28, tokens=56)
    for i in range(2):
        hits, seen = np.zeros(10), 0
        for start in (0, 28):
            window = torch.from_numpy(np.append(stream[start : start + 28], 0))[None]
            states = states_of(model, window, (0,))
            for t in range(28 - i - 1):
                text = states.layers[0][:, : t + 1]
                pseudo = maps(text[:, -1], window[:, t + 1])
                hidden = upper_hidden(model, text, pseudo, first=1)
                order = model.head(hidden)[0, i].argsort(descending=True)[:10].tolist()
                seen += 1
                if int(states.chosen[0, t + i + 1]) in order:
                    hits[order.index(int(states.chosen[0, t + i + 1]))] += 1
        assert hits.sum() > 0
        assert counted[i] == pytest.approx(hits / seen, abs=1e-5)


def test_a_later_pseudo_token_sees_those_before_it() -> None:
    model = tiny_model("softmax", "softmax", "softmax")
    text, rows = torch.randn(1, 6, 16).double(), torch.randn(1, 2, 16).double()
    both = upper_hidden(model, text, rows, first=1)
    other = upper_hidden(model, text, torch.cat((-rows[:, :1], rows[:, 1:]), 1), first=1)
    assert (both[:, 1] - other[:, 1]).abs().max() > 1e-3
    assert_close(both[:, 0], upper_hidden(model, text, rows[:, :1], first=1)[:, 0])


def test_states_enter_a_layer_as_they_are() -> None:
    """Whatever the scale of embeddings and the kind of positions."""
    model = tiny_model("softmax", "softmax", positions="learned")
    states = torch.randn(3, 16).double()
    given = entering(model, states, [4, 5, 6])
    x, _ = model.enter(torch.zeros(3, dtype=torch.long), torch.tensor([4, 5, 6]), [(0, given)])
    assert_close(x, states)


def test_maps_learn_and_the_target_does_not() -> None:
    model = tiny_model("softmax", "softmax", "softmax", dtype=torch.float32).requires_grad_(False)
    training = TRAININGS.build("hidden-transfer:layer=0,steps=2")
    stream = np.array(periodic(300))
    maps = training.make(model, stream, seed=0)
    batch = torch.from_numpy(np.stack([stream[start : start + 17] for start in range(5)]))
    states = states_of(model, batch, training.reads(model.config))
    optimizer, losses = torch.optim.Adam(maps.parameters(), 1e-2), []
    for _ in range(60):
        loss = training.loss(maps, states)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert all(each.grad is None for each in model.parameters())
    assert losses[-1] < 0.5 * losses[0]
    training.measure(maps, stream, context=24, tokens=48)
    assert len(maps.accuracies) == 2


def test_it_survives_the_disk_and_knows_its_target(tmp_path: Path) -> None:
    model = copying()
    maps = randomise(maps_of(model), 1)
    folder = save_drafter(maps, model, tmp_path / "hidden-transfer", dtype=None)
    again = load_drafter(folder, model, TransferMaps)
    assert torch.equal(again.maps, maps.maps) and again.config == maps.config
    made = make_drafter("hidden-transfer", DrafterContext(model, source=tmp_path))
    assert isinstance(made, HiddenTransfer) and made.needs == Want((0,))
    with pytest.raises(DrafterError, match="train-drafter MODEL --kind hidden-transfer"):
        make_drafter("hidden-transfer", DrafterContext(model))
    with pytest.raises(DrafterError, match="never calibrated"):
        HiddenTransfer(maps_of(model, [[]]))
    text = (folder / "drafter.json").read_text().replace('"layer": 0', '"layer": 1')
    (folder / "drafter.json").write_text(text)
    with pytest.raises(DrafterError, match="behind layer 1, and layers above it are needed"):
        load_drafter(folder, model, TransferMaps)


@pytest.mark.parametrize(
    ("layers", "spec", "message"),
    [
        (2, "layer=1", "give a layer from 0 to 0"),
        (1, "", "this one has a single layer"),
        (2, "steps=0", "steps must be 1 or more"),
    ],
)
def test_impossible_layers_are_refused(layers: int, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TRAININGS.build(f"hidden-transfer:{spec}" if spec else "hidden-transfer").reads(
            copying(layers).config
        )
