"""Models whose steps of static shape read their caches by Triton's kernel."""

from __future__ import annotations

import random

import pytest
import torch

from linspec.decoding.step import StepInput
from linspec.errors import ConfigError
from linspec.kernels.gpu.triton import available
from linspec.models.static_step import StaticStep
from tests.helpers import random_tree, tiny_model
from tests.kernels.gpu.trees import DEVICES

pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "taps"), [("softmax", 0), ("softmax", 3), ("by-head", 0)])
def test_a_step_by_the_kernel_equals_the_one_without(
    device: str, name: str, taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, taps=taps, dtype=torch.float32, device=device).to_inference()
    model.native = StaticStep(model, None)
    rng, states = random.Random(1), [model.new_state(2) for _ in range(2)]
    for turn in range(5):
        trees = [random_tree(rng, rng.choice((1, 4, 7))) for _ in range(1 + turn % 2)]
        inputs = [StepInput.tree(slot, tree) for slot, tree in enumerate(trees)]
        logits = []
        for word, state in zip(("off", "on"), states, strict=True):
            monkeypatch.setenv(available.SWITCH, word)
            logits.append(model.step(inputs, state).logits)
            for slot, tree in enumerate(trees):
                state.commit(slot, tree.path_to(len(tree) - 1))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_it_is_the_kernel_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel cannot take is an error, not another path."""
    monkeypatch.setenv(available.SWITCH, "on")
    monkeypatch.setenv(available.INTERPRETED, "1")
    model = tiny_model("softmax").to_inference()
    model.native = StaticStep(model, None)
    tree = random_tree(random.Random(0), 3)
    with pytest.raises(ConfigError, match="got torch.float64"):
        model.step([StepInput.tree(0, tree)], model.new_state(1))
