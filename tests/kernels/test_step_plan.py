"""What a model says to the kernels, and what these say to it."""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from linspec.decoding.step import StepInput
from linspec.kernels.cpu import reasons
from linspec.kernels.cpu.library import Found
from linspec.mixers.config import MixerConfig, RelativeConfig
from linspec.mixers.linformer import Linformer
from linspec.mixers.rope_config import RopeConfig
from linspec.mixers.softmax import Softmax
from linspec.models import step_plan as models_step_plan
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.one_call import why_not
from linspec.models.step_plan import TOLD, step_plan

SHAPE = DecoderConfig(
    vocab_size=31, width=24, layers=2, heads=2, kv_heads=1, head_width=12, mlp_width=40
)


def made(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(SHAPE, **changes)).to_inference()


RELATIVE = {"positions": "relative", "relative": RelativeConfig()}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_width": 514}, "heads of 514 features"),
        ({"mixers": (MixerConfig(name="linformer", group=8), MixerConfig())}, "mixers linformer"),
    ],
)
def test_a_model_says_why_it_runs_layer_by_layer(
    library: ctypes.CDLL, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linformer, "attention_plan", lambda mixer: None)
    model = made(**changes)
    assert model.native is None
    assert reason in str(why_not(model))
    output = model.step([StepInput(0, [1, 2, 3])], model.new_state())
    assert bool(output.logits.isfinite().all())


def test_every_setting_is_told_by_a_plan() -> None:
    assert {each.name for each in fields(DiffusionConfig)} == TOLD


def test_a_setting_that_no_plan_tells_is_named_and_computed_layer_by_layer(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a later version adds, until plans tell it too."""
    monkeypatch.setattr(models_step_plan, "TOLD", TOLD - {"score_cap", "norms"})
    model, ids = made(score_cap=5.0, norms="both"), [1, 2, 3, 4, 5]
    assert model.native is None
    assert "this model's score_cap, norms" in str(why_not(model))
    output = model.step([StepInput(0, ids)], model.new_state())
    torch.testing.assert_close(output.logits, model(torch.tensor([ids]))[0], rtol=1e-4, atol=1e-5)
    assert made().native is not None


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(kind="yarn", factor=4.0, original_max_positions=8, attention_factor=1.3),
        RopeConfig(
            kind="longrope",
            original_max_positions=8,
            attention_factor=1.2,
            short_factors=(1.0,) * 6,
            long_factors=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0),
            long=True,
        ),
    ],
    ids=lambda rope: rope.kind,
)
def test_scaled_positions_are_computed_in_one_call(library: ctypes.CDLL, rope: RopeConfig) -> None:
    model, ids = made(rope=rope), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert model.native is not None
    output = model.step([StepInput(0, ids)], model.new_state())
    expected = model(torch.tensor([ids]))[0]
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    assert (made()(torch.tensor([ids]))[0] - expected).abs().max() > 1e-3


def test_only_the_first_of_several_reasons_was_named(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Softmax, "attention_plan", lambda mixer: None)
    model = made(head_width=514)
    reasons = ("heads of 514 features", "mixers softmax")
    assert all(reason in str(why_not(model)) for reason in reasons)
    assert "not packed" not in str(why_not(model))


def test_a_plain_model_has_no_reason(library: ctypes.CDLL) -> None:
    model = made()
    assert why_not(model) is None and model.native is not None


@pytest.mark.parametrize("changes", [{"scaled_scores": False}, {"logit_scale": 0.5}])
def test_scores_and_logits_of_another_scale_were_computed_with_the_usual_one(
    changes: dict[str, Any],
) -> None:
    model, ids = made(**changes), [1, 2, 3, 4, 5]
    output = model.step([StepInput(0, ids)], model.new_state())
    torch.testing.assert_close(output.logits, model(torch.tensor([ids]))[0], rtol=1e-4, atol=1e-5)


def test_plain_weights_and_other_embeddings_have_a_reason(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = step_plan(made())
    assert "not packed" in str(reasons.why_not(replace(plan, head=None)))
    half = replace(plan, embedding=plan.embedding.half())
    assert "torch.float16" in str(reasons.why_not(half))
    monkeypatch.setattr(reasons, "load", lambda: Found(None, "torch", "a test"))
    assert reasons.why_not(plan) == "a test"
