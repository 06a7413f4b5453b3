"""Drafts that cost nothing, by the policy that looks at confidences, in virtual time.

Texts are those of an agent that asks for nearly the same again and again; what rounds cost is written down.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from replay import accepted, agent_log, running
from world import CURVES

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree, chain
from linspec.drafters.base import Drafter
from linspec.drafters.mixed import Mixed
from linspec.drafters.suffix import Suffix
from linspec.policies.base import RoundTimes
from linspec.policies.free_drafts import Rooms
from linspec.policies.planner import next_size
from linspec.policies.specdec_pp import SpecDecPP

COSTS = CURVES["135m-int8"]
LOG = agent_log(random.Random(7), 10)
# plain rounds for each draft of a model
DEAR = 0.3


class Model(Drafter):
    """Drafts tokens of the output, or wrong ones, and may say how often it is right; each costs `DEAR`."""

    name, max_nodes = "model", 8

    def __init__(self, right: float, *, confident: bool = True) -> None:
        super().__init__()
        self.confident = confident
        self.right, self.output, self.made = right, list[int](), 0
        self._rng = random.Random(3)

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        (sequence,), (budget,) = sequences, budgets
        done = len(sequence.tokens)
        drafts = [
            token if self._rng.random() < self.right else token + 1
            for token in self.output[done : done + budget.chain]
        ]
        self.made += len(drafts)
        return [
            replace(chain((sequence.root, *drafts)), confidences=(1.0, *[self.right] * len(drafts)))
        ]

    def expected(self, budget: Budget) -> float:
        return sum(self.right**depth for depth in range(1, budget.chain + 1))


@dataclass
class Played:
    """What became of a log: rounds, tokens, and how many plain rounds all took."""

    tokens: int = 0
    rounds: int = 0
    plain_rounds: float = 0.0

    @property
    def times_plain(self) -> float:
        return self.tokens / self.plain_rounds


def play(drafter: Drafter, policy: SpecDecPP, log: Sequence[tuple[list[int], list[int]]]) -> Played:
    """Answer one request after the other."""
    played = Played()
    for prompt, output in log:
        _answer(drafter, policy, prompt, output, played)
    return played


def _answer(
    drafter: Drafter, policy: SpecDecPP, prompt: list[int], output: list[int], played: Played
) -> None:
    parts = [part.drafter for part in drafter.parts] if isinstance(drafter, Mixed) else [drafter]
    models = [part for part in parts if isinstance(part, Model)]
    for model in models:
        model.output = prompt + output
    sequence, text = running(prompt), prompt + output
    drafter.started(sequence)
    while len(sequence.tokens) < len(text):
        left, made = text[len(sequence.tokens) :], sum(model.made for model in models)
        (budget,) = policy.plan([sequence], drafter)
        tree = chain((sequence.root,))
        if budget.nodes:
            (tree,) = drafter.propose([sequence], [budget.within(drafter.max_nodes, len(left))])
        if len(tree) > 1:
            tree = tree.first(1 + policy.keep(sequence, tree))
        path = accepted(tree, left)[: len(left)]
        if len(tree) > 1:
            policy.observe(sequence, len(tree) - 1, len(path) - 1, drafter.score(sequence, tree))
            drafter.observe(sequence, tree, path)
        else:
            drafter.passed(sequence)
        drafting = DEAR * COSTS(1) * (sum(model.made for model in models) - made)
        step = COSTS(len(tree))
        policy.observe_round(RoundTimes(drafting, step, len(tree), len(tree) - 1))
        sequence.tokens += left[: len(path)]
        played.tokens += len(path)
        played.rounds += 1
        played.plain_rounds += (drafting + step) / COSTS(1)
    drafter.finished(sequence)
    policy.release(sequence.slot)


def test_what_comes_again_word_for_word_is_drafted_in_large_trees() -> None:
    """Never more than three drafts were asked for where all of them were right."""
    drafter, policy = Suffix(), SpecDecPP(COSTS)
    play(drafter, policy, LOG)
    again = play(drafter, policy, LOG)
    assert again.tokens / again.rounds >= 8
    assert again.times_plain >= 3


@pytest.mark.parametrize("confident", [True, False])
def test_a_mix_goes_on_drafting_from_memory_where_its_model_does_not_pay(confident: bool) -> None:
    """It was switched off as a whole, and seldom tried again."""
    memory = play(Suffix(), SpecDecPP(COSTS), LOG * 2)
    dear = Model(right=0.3, confident=confident)
    mix = play(Mixed([Suffix(), dear]), SpecDecPP(COSTS), LOG * 2)
    assert memory.times_plain >= 1.5
    assert mix.times_plain >= 0.97 * memory.times_plain
    assert dear.made > 0


@pytest.mark.parametrize("confident", [True, False])
def test_a_mix_uses_the_model_that_pays(confident: bool) -> None:
    rng = random.Random(4)
    log = [([1, 2], [rng.randrange(500) for _ in range(120)]) for _ in range(12)]
    alone = play(Model(right=0.95), SpecDecPP(COSTS), log)
    mix = play(Mixed([Suffix(), Model(0.95, confident=confident)]), SpecDecPP(COSTS), log)
    assert alone.times_plain >= 1.2
    assert mix.times_plain >= 0.95 * alone.times_plain


def test_rooms_grow_where_they_are_filled_and_shrink_to_what_was_kept() -> None:
    rooms = Rooms(4, 63)
    assert rooms.of(0) == 4
    rooms.kept(0, 4, 4)
    assert rooms.of(0) == next_size(4)
    rooms.kept(0, 2, 2)
    assert rooms.of(0) == next_size(4)
    rooms.kept(0, 63, 63)
    rooms.kept(0, 63, 63)
    assert rooms.of(0) == 63
    assert rooms.of(1) == 63
    rooms.kept(0, 0, 63)
    assert rooms.of(0) == 4
    rooms.release(0)
    assert rooms.of(0) == 4
