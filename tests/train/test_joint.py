"""Kinds that change the model: a new one with its drafter inside, and the old one untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from linspec import LLM, SamplingParams
from linspec.checkpoints.hub import load_model
from linspec.drafters import DRAFTERS
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.train.drafters import TRAININGS, DrafterConfig, train_drafter
from linspec.train.drafters.joint import JointTraining, _with_adapters
from linspec.train.drafters.medusa import heads_loss
from linspec.train.drafters.states import states_of

SHORT = DrafterConfig(
    tokens=6 * 128,
    context=32,
    batch_tokens=128,
    calibration_tokens=512,
    precision="float32",
    lr=1e-2,
    save_every=0.0,
)
KINDS = [e.name for e in TRAININGS if issubclass(e.value, JointTraining)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_has_its_drafter_inside(
    kind: str, teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    before = {p.name: p.read_bytes() for p in teacher_dir.iterdir() if p.is_file()}
    out = train_drafter(teacher_dir, tmp_path / "new", kind=kind, data=[corpus], config=SHORT)
    drafter = TRAININGS[kind].drafter
    assert (out / drafter / "drafter.json").exists() and drafter in DRAFTERS
    assert {p.name: p.read_bytes() for p in teacher_dir.iterdir() if p.is_file()} == before
    ours, theirs = load_model(out).state_dict(), load_model(teacher_dir).state_dict()
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    prompts, params = ["the old fox", "a red dog near my"], SamplingParams(max_tokens=12)
    plain = LLM(out, drafter="none").generate(prompts, params)
    found = LLM(out, drafter=drafter, policy=12).generate(prompts, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_bit_for_bit(
    kind: str, teacher_dir: Path, tmp_path: Path, corpus: Path, killed_before, no_training
) -> None:
    options = {"kind": kind, "data": [corpus], "config": SHORT}
    whole = train_drafter(teacher_dir, tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="killed"), killed_before(3):
        train_drafter(teacher_dir, tmp_path / "cut", **options)
    cut = train_drafter(teacher_dir, tmp_path / "cut", resume=True, **options)
    for path in sorted(p for p in whole.rglob("*.safetensors")):
        assert path.read_bytes() == (cut / path.relative_to(whole)).read_bytes()
    with no_training():
        assert train_drafter(teacher_dir, whole, resume=True, **options) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_model_is_never_written_to(kind: str, teacher_dir: Path, corpus: Path) -> None:
    for out in (None, teacher_dir):
        with pytest.raises(ConfigError, match="changes the model; give .* --out"):
            train_drafter(teacher_dir, out, kind=kind, data=[corpus], config=SHORT)
    with pytest.raises(ConfigError, match="rank must be 1 or more"):
        TRAININGS.build(f"{kind}:rank=0")


def test_medusa2_is_held_to_what_the_model_said(tiny_teacher: Callable[..., Decoder]) -> None:
    """The loss is the model's change, 0 at first, and a fifth of that of the heads; both get gradients."""
    model = tiny_teacher().requires_grad_(False)
    training = TRAININGS.build("medusa2:heads=2,hidden=8")
    heads = training.make(model, np.arange(200) % 290, seed=0)
    batch = torch.randint(0, 290, (2, 12))
    with torch.no_grad():
        expected = 0.2 * heads_loss(heads, states_of(model, batch), 0.8)
    adapted = _with_adapters(model, 4, seed=0)
    loss = training.joint_loss(heads, adapted, batch)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    learning = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    grads = [p.grad for p in (*adapted.parameters(), *heads.parameters()) if p.grad is not None]
    assert any(grad.abs().sum() > 0 for grad in grads)
    assert TRAININGS["medusa2"].drafter == "medusa"
    with pytest.raises(ConfigError, match="warmup must be below 1"):
        TRAININGS.build("medusa2:warmup=1")
