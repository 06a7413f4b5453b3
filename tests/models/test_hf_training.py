"""Training linspec models under transformers: recomputed activations, and ids that no model knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, mixer_config, random_tokens, randomise, tiny_config
from transformers import Trainer, TrainingArguments

from linspec.errors import InputError
from linspec.integrations.transformers.config import LinspecConfig
from linspec.integrations.transformers.model import LinspecForCausalLM
from linspec.models.block import Block

MIXERS = ("aug:softmax", "softmax", "gdn:softmax", "performer")
ROWS = [random_tokens(23, seed=1), random_tokens(23, seed=2)]


def make(dtype: torch.dtype = torch.float64) -> LinspecForCausalLM:
    shape = tiny_config(*(mixer_config(name) for name in MIXERS))
    model = LinspecForCausalLM(LinspecConfig(decoder=shape.to_dict()))
    randomise(model, seed=1)
    return model.to(dtype).train()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """Which blocks were run, in order."""
    seen: list[Block] = []
    forward = Block.forward

    def counted(self: Block, *args: Any) -> torch.Tensor:
        seen.append(self)
        return forward(self, *args)

    monkeypatch.setattr(Block, "forward", counted)
    return seen


def gradients(model: LinspecForCausalLM) -> dict[str, torch.Tensor]:
    ids, mask = torch.tensor(ROWS), torch.ones(2, 23)
    mask[1, :5] = 0
    model.zero_grad()
    model(ids, mask, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# older transformers know the old names only, and recompute every layer
RENAMED = hasattr(LinspecForCausalLM, "activation_checkpointing_enable")
NAME = "activation_checkpointing" if RENAMED else "gradient_checkpointing"


def switch(model: LinspecForCausalLM, end: str, *args: Any, **options: Any) -> None:
    """Turn it on or off by the name that this version of transformers has."""
    getattr(model, f"{NAME}_{end}")(*args, **options)


def old_name(model: LinspecForCausalLM) -> None:
    with pytest.warns(FutureWarning, match="gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()


SWITCHES: dict[str, tuple[Callable[[LinspecForCausalLM], object], int]] = {
    "default": (lambda model: switch(model, "enable"), 4),
    "reentrant": (lambda model: switch(model, "enable", {"use_reentrant": True}), 4),
}
if RENAMED:
    SWITCHES["old name"] = (old_name, 4)
    SWITCHES["every second"] = (lambda model: switch(model, "enable", every_n_layers=2), 2)


@pytest.mark.parametrize("way", SWITCHES)
def test_recomputed_activations_give_the_same_gradients(way: str, runs: list[Block]) -> None:
    model = make()
    expected = gradients(model)
    assert len(runs) == len(MIXERS)
    turn_on, recomputed = SWITCHES[way]
    turn_on(model)
    runs.clear()
    found = gradients(model)
    assert len(runs) == len(MIXERS) + recomputed
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12, msg=name)
    switch(model, "disable")
    runs.clear()
    gradients(model)
    assert len(runs) == len(MIXERS)


def test_nothing_is_recomputed_outside_training(runs: list[Block]) -> None:
    model = make().eval()
    switch(model, "enable")
    gradients(model)
    assert len(runs) == len(MIXERS)


def trained(folder: Path, **options: Any) -> LinspecForCausalLM:
    model = make(torch.float32)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    Trainer(model=model, args=args, train_dataset=data).train()
    return model


# what transformers' trainer sets up without a second process or a pinned memory
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_can_recompute_activations(tmp_path: Path, runs: list[Block]) -> None:
    plain = trained(tmp_path / "plain")
    count = len(runs)
    runs.clear()
    saving = trained(tmp_path / "saving", **{NAME: True})
    assert len(runs) == 2 * count
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(saving.get_parameter(name), weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_foreign_token_ids_are_named(token: int) -> None:
    model = make().eval()
    ids = torch.tensor([[1, token, 2]])
    with pytest.raises(InputError, match=rf"input_ids hold token {token}, the model knows 0 to 30"):
        model(ids)
    with pytest.raises(InputError, match=rf"input_ids hold token {token}"):
        model(ids, use_cache=True)
    with pytest.raises(InputError, match=rf"labels hold token {token}"):
        model(torch.tensor([[1, 5, 2]]), labels=ids)
    with pytest.raises(InputError, match=rf"input_ids hold token {token}"):
        model.generate(ids, max_new_tokens=2)


def test_ids_and_labels_of_a_wrong_kind_are_named() -> None:
    model, ids = make().eval(), torch.tensor(ROWS)
    with pytest.raises(InputError, match=r"whole numbers, got a tensor of torch.float32"):
        model(ids.float())
    with pytest.raises(InputError, match=r"labels of shape \(2, 3\) for input_ids of shape"):
        model(ids, labels=ids[:, :3])
    ignored = torch.full_like(ids, -100)
    ignored[0, 5] = 7
    assert model(ids, labels=ignored).loss.isfinite()
