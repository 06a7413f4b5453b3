"""Chimera reads the target's states, drafts what training taught it, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from copying import periodic
from helpers import VOCAB, assert_close, random_tokens, randomise, tiny_model

from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import FINAL
from linspec.decoding.tree import Budget
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.chimera import Chimera
from linspec.drafters.chimera_net import ChimeraConfig, ChimeraNet
from linspec.drafters.saved import load_drafter, save_drafter
from linspec.engine.engine import Engine
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.policies.base import Policy
from linspec.policies.fixed import Fixed
from linspec.train.drafters import TRAININGS
from linspec.train.drafters.chimera import calibrate, drafted_states, features_of
from linspec.train.drafters.states import states_of
from linspec.verifiers import LosslessVerifier

RATES = [[0.5, 0.3], [0.4, 0.2], [0.3]]


def net_of(model: Decoder, *, window: int = 6, vocabulary: int = 0) -> ChimeraNet:
    shape = ChimeraConfig(
        width=model.config.width,
        vocab_size=model.config.vocab_size,
        depth=3,
        heads=2,
        head_width=8,
        inner=24,
        window=window,
        vocabulary=vocabulary,
    )
    return randomise(ChimeraNet(shape, model, RATES), 3).to(model.dtype)


class Watched(Chimera):
    """Keeps what its layer made of the root, and of the first node of each further depth."""

    def propose(self, sequences, budgets):  # type: ignore[no-untyped-def]
        trees = super().propose(sequences, budgets)
        self.seen = [(list(sequences[0].tokens), trees[0])]
        self.check(sequences[0], trees[0])
        return trees

    def check(self, sequence: RunningSequence, tree: object) -> None:
        """The same from scratch: the target's states of the text so far, and features of the draft."""
        net, (text, found) = self.net, self.seen[0]
        reached = 0
        with torch.no_grad():
            for depth in range(1, found.shape.deepest + 1):
                node = next(n for n in range(len(found)) if found.depths[n] == depth)
                path = found.path_to(found.parents[node])
                ids = torch.tensor([[*text[:-1], *(found.tokens[n] for n in path)]])
                ids = torch.nn.functional.pad(ids, (0, 4))
                final = net.target.hidden(ids[:, : len(text) - 1])
                cuts = torch.tensor([len(text) - 2])
                width = min(net.config.window, self.own.state.length(sequence.slot))
                made = drafted_states(net, final, features_of(net, ids), cuts, width)[
                    0, 0, depth - 1
                ]
                chances = net.logits(net.joined(final[0, -1], made, depth - 1)).softmax(-1)
                likely = chances.topk(8)
                own = dict(
                    zip(net.tokens(likely.indices).tolist(), likely.values.tolist(), strict=True)
                )
                assert found.confidences[node] == pytest.approx(own[found.tokens[node]], abs=1e-6)
                reached += 1
        self.checked = getattr(self, "checked", 0) + reached


class Sometimes(Policy):
    """Drafts in two rounds of three."""

    rounds = 0

    def plan(self, sequences, drafter):  # type: ignore[no-untyped-def]
        self.rounds += 1
        return [Budget.of(9 if self.rounds % 3 else 0)] * len(sequences)


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize("length", [2, 5, 40])
def test_what_it_kept_is_what_it_computes_from_scratch(mixer: str, length: int) -> None:
    """Through accepted drafts and rounds without any; the training form is the serving form."""
    model = tiny_model(mixer)
    drafter = Watched(net_of(model))
    engine = Engine(model, verifier=LosslessVerifier(), drafter=drafter, policy=Sometimes())
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    engine.add(Request(tuple(random_tokens(length)), params))
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
    assert drafter.checked > 20


@torch.no_grad()
@pytest.mark.parametrize("vocabulary", [0, 14])
def test_calibration_equals_a_brute_force_count(vocabulary: int) -> None:
    model, stream = tiny_model("softmax"), np.random.default_rng(0).integers(0, VOCAB, 40)
    net = net_of(model, vocabulary=vocabulary)
    counted = calibrate(net, stream, context=20, tokens=40)
    for d in range(3):
        hits, seen = np.zeros(10), 0
        for start in (0, 20):
            window = torch.from_numpy(stream[start : start + 20])[None]
            states = states_of(model, torch.nn.functional.pad(window, (0, 1)))
            features = features_of(net, torch.nn.functional.pad(window, (0, 3)))
            for t in range(20 - d - 1):
                cuts, width = torch.tensor([t]), min(t + 1, 6)
                made = drafted_states(net, states.final, features, cuts, width)[0, 0, d]
                logits = net.logits(net.joined(states.final[0, t], made, d))
                order = net.tokens(logits.argsort(descending=True)[:10]).tolist()
                seen += 1
                if int(states.chosen[0, t + d + 1]) in order:
                    hits[order.index(int(states.chosen[0, t + d + 1]))] += 1
        assert hits.sum() > 0
        assert counted[d] == pytest.approx(hits / seen, abs=1e-5)


def test_drafts_in_parallel_are_drafts_one_by_one() -> None:
    """A draft sees its own chain and the verified places, never those of another cut."""
    model = tiny_model("softmax")
    net, ids = net_of(model), torch.tensor([random_tokens(24)])
    with torch.no_grad():
        final, features = model.hidden(ids), features_of(net, ids)
        cuts = torch.tensor([5, 9, 13])
        together = drafted_states(net, final, features, cuts, 6)
        for place, cut in enumerate(cuts.tolist()):
            rows = torch.cat((final[:, : cut + 1], features[:, cut + 1 : cut + 4]), 1)
            assert_close(together[:, place], net.through(rows)[:, cut + 1 :], atol=1e-6)


def test_it_learns_and_the_target_does_not() -> None:
    model = tiny_model("softmax", dtype=torch.float32).requires_grad_(False)
    spec = "chimera:depth=2,heads=2,head_width=8,inner=24,window=6"
    training, stream = TRAININGS.build(spec), np.array(periodic(300))
    net = training.make(model, stream, seed=0)
    batch = torch.from_numpy(np.stack([stream[start : start + 21] for start in range(5)]))
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for step in range(60):
        loss = training.loss(net, states_of(model, batch.roll(step, 0)))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert all(each.grad is None for each in model.parameters())
    assert losses[-1] < 0.3 * losses[0]
    training.measure(net, stream, context=24, tokens=96)
    assert min(row[0] for row in net.accuracies) > 0.6
    # and so it drafts what the target goes on with
    engine = Engine(model, verifier=LosslessVerifier(), drafter=Chimera(net), policy=Fixed(6))
    engine.add(Request(tuple(periodic(40)), SamplingParams(max_tokens=3, ignore_eos=True)))
    while engine.busy:
        (outcome,) = engine.step() or [None]
    assert outcome is not None and outcome.sequence.stats.accepted >= 1


def test_it_survives_the_disk_and_knows_its_target(tmp_path: Path) -> None:
    model = tiny_model("softmax", dtype=torch.float32)
    net = net_of(model, vocabulary=9)
    folder = save_drafter(net, model, tmp_path / "chimera", dtype=None)
    again = load_drafter(folder, model, ChimeraNet)
    ids, x = torch.randint(0, VOCAB, (4, 3)), torch.randn(1, 5, 16)
    assert torch.equal(again.features(ids), net.features(ids)) and again.config == net.config
    assert torch.equal(again.through(x), net.through(x)) and torch.equal(again.drafted, net.drafted)
    drafter = make_drafter("chimera", DrafterContext(model, source=tmp_path))
    assert isinstance(drafter, Chimera) and drafter.needs.layers != (FINAL,)
    with pytest.raises(DrafterError, match="train-drafter MODEL --kind chimera"):
        make_drafter("chimera", DrafterContext(model))
    with pytest.raises(ConfigError, match="cannot draft 32 tokens of the 31"):
        net_of(model, vocabulary=32)
    with pytest.raises(ConfigError, match="depth must be 1 or more"):
        TRAININGS.build("chimera:depth=0")
