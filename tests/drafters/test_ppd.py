"""Prompt tokens ride beside what is verified, change nothing of it, and guess what comes next."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from copying import copying, periodic
from helpers import assert_close, feed, random_tokens, random_tree, remembered, tiny_model

from linspec.decoding.probes import Probes
from linspec.decoding.request import Request
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.lookup import LookupOptions, PromptLookup
from linspec.drafters.mixed import Mixed
from linspec.drafters.ppd import PPD, PromptsConfig, PromptTokens
from linspec.drafters.saved import load_drafter, save_drafter
from linspec.engine.engine import Engine
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.policies.base import Policy
from linspec.policies.costs import CostCurve
from linspec.policies.fixed import Fixed
from linspec.policies.goodput import Goodput
from linspec.verifiers import LosslessVerifier

SURE = [[0.95, 0.02], [0.9, 0.02], [0.9, 0.02]]


def prompts_of(model: Decoder, accuracies: Sequence[Sequence[float]] = SURE) -> PromptTokens:
    shape = PromptsConfig(
        width=model.config.width, vocab_size=model.config.vocab_size, prompts=len(accuracies)
    )
    return PromptTokens(shape, accuracies).to(model.dtype)


def decoded(
    model: Decoder,
    drafter: PPD | None,
    policy: Policy,
    prompts: Sequence[list[int]],
    most: int = 60,
) -> list[RunningSequence]:
    engine = Engine(model, verifier=LosslessVerifier(), drafter=drafter, policy=policy)
    params = SamplingParams(max_tokens=most, ignore_eos=True)
    for prompt in prompts:
        engine.add(Request(tuple(prompt), params))
    found = {}
    while engine.busy:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            if outcome.finished:
                found[outcome.sequence.request] = outcome.sequence
    return [found[request] for request in sorted(found)]


@pytest.mark.parametrize("mixer", ["softmax", "window", "aug", "gla"])
def test_verified_nodes_are_what_they_are_without_probes(mixer: str) -> None:
    """Their scores, and the state after a commit: that of a fresh reading."""
    model, text = tiny_model(mixer), random_tokens(11)
    tree = random_tree(random.Random(1), 7)
    probes = Probes((0, 7, 8, 3, 10, 6), torch.randn(6, 16, dtype=torch.float64))
    state = model.new_state(2)
    for slot in (0, 1):
        feed(model, state, text, slot)
    plain = model.step([StepInput.tree(0, tree)], state).logits
    ridden = model.step([probes.beside(tree, 1, model.embed)], state).logits
    assert_close(ridden[:7], plain)
    path = tree.path_to(6)
    state.commit(1, path)
    fresh = model.new_state()
    feed(model, fresh, [*text, *(tree.tokens[node] for node in path)])
    for one, other in zip(remembered(model, state, 1), remembered(model, fresh), strict=True):
        assert_close(one["length"], other["length"])
        assert_close(
            model.step([StepInput(1, [3])], state).logits,
            model.step([StepInput(0, [3])], fresh).logits,
        )
        state.drop(1)
        fresh.drop(0)


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_probe_sees_its_path_and_the_probes_before_it(mixer: str) -> None:
    model, text = tiny_model(mixer), random_tokens(9)
    embeddings = torch.randn(3, 16, dtype=torch.float64)
    tree = TokenTree((4, 5, 6, 7), (-1, 0, 0, 2))
    probes = Probes((3, 4, 5), embeddings)
    state = model.new_state(2)
    feed(model, state, text)
    found = model.step([probes.beside(tree, 0, model.embed)], state).logits[4:]
    feed(model, state, [*text, 4, 6, 7], 1)
    alone = model.step([StepInput(1, [0, 0, 0], embeddings=embeddings)], state).logits
    assert_close(found, alone)


def test_the_probes_of_a_node_are_found() -> None:
    tree = TokenTree((1, 2, 3), (-1, 0, 0))
    probes = Probes((0, 3, 1, 2, 6, 7), torch.zeros(6, 4))
    assert [probes.below(node, tree) for node in range(3)] == [[3, 4], [5], [6, 7, 8]]


@pytest.mark.parametrize("rows", [1, 3, 8, 30, 60])
def test_drafts_come_out_of_the_step_that_verifies(rows: int) -> None:
    """The text is certain, so every guess is right: a round brings what the layouts say."""
    model = copying()
    drafter = PPD(prompts_of(model, [[1.0], [1.0], [1.0]]))
    text = [periodic(11, seed) for seed in range(3)]
    plain = decoded(model, None, Fixed(0), text)
    found = decoded(model, drafter, Fixed(rows), text)
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    for each in found:
        brought = each.stats.tokens_per_round
        assert brought == pytest.approx(1 + drafter.expected(Budget.of(rows)), rel=0.15)
    assert rows < 8 or all(each.stats.tokens_per_round > 2.5 for each in found)


def test_the_policy_chooses_rows_by_what_they_cost() -> None:
    model = copying()
    text = [periodic(11, seed) for seed in range(3)]
    plain = decoded(model, None, Fixed(0), text, 150)
    for curve, pays in (({1: 1.0, 64: 1.3}, True), ({1: 1e-9, 64: 6.4e-8}, False)):
        drafter, policy = PPD(prompts_of(model)), Goodput(CostCurve(curve))
        policy.observe_round = lambda times: None  # type: ignore[method-assign]  # no clock here
        found = decoded(model, drafter, policy, text, 150)
        assert [each.tokens for each in found] == [each.tokens for each in plain]
        assert (found[0].stats.tokens_per_round > 1.5) is pays


def test_an_attempt_after_plain_rounds_lasts_until_something_is_drafted() -> None:
    """The first of its rounds has no guesses: it only lets prompt tokens ride."""
    model = copying()
    # as bad as can be by what is known of them: never planned, only tried
    drafter = PPD(prompts_of(model, [[1e-3]] * 3))
    policy = Goodput(CostCurve({1: 1.0, 64: 1.5}))
    policy.observe_round = lambda times: None  # type: ignore[method-assign]  # no clock here
    (found,) = decoded(model, drafter, policy, [periodic(11)], 150)
    assert found.stats.accepted == found.stats.drafted >= 2


def test_near_the_last_position_no_prompt_token_goes_beyond() -> None:
    model = tiny_model("softmax", max_positions=32)
    plain = decoded(model, None, Fixed(0), [random_tokens(9)], 100)
    drafter = PPD(prompts_of(model, [[0.5, 0.2]] * 3))
    found = decoded(model, drafter, Fixed(20), [random_tokens(9)], 100)
    assert found[0].tokens == plain[0].tokens


def test_it_survives_the_disk_and_knows_its_target(tmp_path: Path) -> None:
    model = copying()
    tokens = prompts_of(model)
    torch.nn.init.normal_(tokens.embeddings)
    assert sum(each.numel() for each in tokens.parameters()) < 5000
    folder = save_drafter(tokens, model, tmp_path / "ppd", dtype=None)
    again = load_drafter(folder, model, PromptTokens)
    assert torch.equal(again.embeddings, tokens.embeddings) and again.accuracies == SURE
    drafter = make_drafter(f"ppd:{folder}", DrafterContext(model))
    assert isinstance(drafter, PPD)
    assert isinstance(make_drafter("ppd", DrafterContext(model, source=tmp_path)), PPD)
    with pytest.raises(DrafterError, match="trained for another model"):
        load_drafter(folder, tiny_model("softmax"), PromptTokens)
    with pytest.raises(DrafterError, match="train-drafter MODEL --kind ppd"):
        make_drafter("ppd", DrafterContext(model, source=tmp_path / "elsewhere"))
    with pytest.raises(DrafterError, match="never calibrated"):
        PPD(prompts_of(model, [[], []]))


class Foul(PPD):
    """Prompt tokens that break a rule in the second sequence."""

    given: Any = None

    def probes(self, sequence: RunningSequence, tree: TokenTree) -> Probes | None:
        return super().probes(sequence, tree) if sequence.number != 2 else self.given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "gave 7; what rides are Probes"),
        (Probes((0,), torch.zeros(1, 15)), r"embeddings \[1, 15\] for 1 probes"),
        (Probes((0,) * 70, torch.zeros(70, 16)), "70 probes beside a tree of 1 nodes"),
        (Probes((1,), torch.zeros(1, 16)), "the parent 1; .*0 to 0"),
    ],
)
def test_foul_probes_end_their_own_sequence(given: Any, message: str) -> None:
    model = copying()
    drafter = Foul(prompts_of(model))
    drafter.given = given
    engine = Engine(model, verifier=LosslessVerifier(), drafter=drafter, policy=Fixed(8))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    for seed in range(3):
        engine.add(Request(tuple(periodic(11, seed)), params))
    ends = {}
    while engine.busy:
        for outcome in engine.step():
            if outcome.finished:
                ends[outcome.sequence.request] = outcome
    assert ends[1].error is None and ends[3].error is None
    with pytest.raises(DrafterError, match=message):
        raise ends[2].error  # type: ignore[misc]  # it is there


def test_in_a_mix_its_prompt_tokens_ride_with_whatever_is_verified() -> None:
    """Suffix finds the period at once; without it, prompt tokens draft."""
    model = copying()
    text = [periodic(11, seed) for seed in range(3)]
    plain = decoded(model, None, Fixed(0), text)
    mix = Mixed([PromptLookup(options=LookupOptions(min_ngram=1)), PPD(prompts_of(model))])
    assert mix.probing
    found = decoded(model, mix, Fixed(60), text)
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    with pytest.raises(ConfigError, match="ppd and ppd cannot be mixed"):
        Mixed([PPD(prompts_of(model)), PPD(prompts_of(model))])
