"""The size of a calibrated tree follows from what nodes cost on the machine."""

from __future__ import annotations

import pytest
from helpers import tiny_model

from linspec.decoding.tree import Budget
from linspec.drafters.base import Drafter
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.drafters.medusa import Medusa
from linspec.drafters.ppd import PPD, PromptsConfig, PromptTokens
from linspec.policies.costs import CostCurve
from linspec.policies.planner import choose, sizes_up_to, steps_of

ACCURACIES = [
    [0.6, 0.15, 0.07, 0.04, 0.02],
    [0.45, 0.12, 0.06, 0.03, 0.02],
    [0.3, 0.1, 0.05, 0.03, 0.02],
]
CURVES = {
    "flat": {1: 1.0, 64: 1.05},
    "gentle": {1: 1.0, 16: 1.15, 64: 2.0},
    "steep": {1: 1.0, 4: 1.3, 16: 3.0, 64: 12.0},
    "linear": {1: 1.0, 64: 64.0},
}


class Machine:
    """Costs of steps alone."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.curve = CostCurve(seconds)

    def round(self, nodes: float) -> float:
        low = int(nodes)
        return self.curve(low) + (nodes - low) * (self.curve(low + 1) - self.curve(low))

    def drafting(self, drafts: int) -> float:
        return 0.0

    def asking(self) -> float:
        return 0.0


def drafters() -> dict[str, Drafter]:
    model = tiny_model("softmax")
    size = {"width": model.config.width, "vocab_size": model.config.vocab_size}
    return {
        "medusa": Medusa(MedusaHeads(HeadsConfig(**size, heads=3), model, ACCURACIES)),
        "ppd": PPD(PromptTokens(PromptsConfig(**size, prompts=3), ACCURACIES)),
    }


@pytest.mark.parametrize("name", ["medusa", "ppd"])
def test_the_policy_takes_the_tree_with_the_most_tokens_for_its_cost(name: str) -> None:
    drafter, chosen = drafters()[name], []
    sizes = sizes_up_to(drafter.max_nodes)
    gains = {nodes: drafter.expected(Budget.of(nodes)) for nodes in sizes}
    for seconds in CURVES.values():
        machine = Machine(seconds)
        (found,) = choose([1.0], steps_of(gains), sizes, machine).nodes
        worth = {n: (1 + gain) / machine.round(1 + n) for n, gain in gains.items()} | {0: 1.0}
        assert worth[found] >= 0.97 * max(worth.values())
        chosen.append(found)
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > 30 and chosen[-1] == 0


def test_a_calibrated_tree_beats_a_chain_and_a_full_tree_of_its_size() -> None:
    medusa = drafters()["medusa"]
    first, second, third = ([sum(row[:k]) for k in range(6)] for row in ACCURACIES)
    # three guesses, each with the three next ones
    full = first[3] * (1 + second[3])
    assert medusa.expected(Budget.of(12)) > full
    chain = first[1] * (1 + second[1] * (1 + third[1]))
    assert medusa.expected(Budget.of(3)) >= chain
    assert medusa.expected(Budget.of(12)) > chain
