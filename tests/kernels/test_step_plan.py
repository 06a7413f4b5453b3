"""What a model says to the kernels, and what these say to it."""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from linspec.decoding.step import StepInput
from linspec.kernels.cpu import step
from linspec.kernels.cpu.library import Found
from linspec.mixers.config import MixerConfig
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.step_plan import TOLD, step_plan, why_not

SHAPE = DecoderConfig(
    vocab_size=31, width=24, layers=2, heads=2, kv_heads=1, head_width=12, mlp_width=40
)


def made(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(SHAPE, **changes)).to_inference()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm": "layer"}, "only RMS norms"),
        ({"positions": "learned"}, "rotary positions"),
        ({"activation": "gelu"}, "only gated SiLU"),
        ({"gated_mlp": False}, "only gated SiLU"),
        ({"head_width": 514}, "heads of 514 features"),
        ({"scaled_scores": False}, "another scale"),
        ({"logit_scale": 0.5}, "another scale"),
        ({"positions": "rope", "rope": RopeConfig(partial_rotary_factor=0.5)}, "only a part turns"),
        ({"mixers": (MixerConfig(name="gla", group=8), MixerConfig())}, "mixers gla"),
    ],
)
def test_a_model_says_why_it_runs_layer_by_layer(
    library: ctypes.CDLL, changes: dict[str, Any], reason: str
) -> None:
    model = made(**changes)
    assert model.native is None
    assert reason in str(why_not(model))
    output = model.step([StepInput(0, [1, 2, 3])], model.new_state())
    assert bool(output.logits.isfinite().all())


# every setting that no plan tells, with a value that changes what is computed
UNTOLD: dict[str, dict[str, Any]] = {
    "norms": {"norms": "both"},
    "residual": {"residual": "parallel"},
    "residual_scale": {"residual_scale": 0.5},
    "embedding_scale": {"embedding_scale": 3.0},
    "logit_cap": {"logit_cap": 5.0},
    "score_cap": {"score_cap": 5.0},
    "norm_offset": {"norm_offset": True},
    "qk_norm_of": {"qk_norm": True, "qk_norm_of": "whole"},
    "layer_ropes": {"layer_ropes": ("main", "none")},
    "local_rope": {"layer_ropes": ("main", "local"), "local_rope": RopeConfig(theta=50.0)},
}


def test_every_setting_is_told_by_a_plan_or_has_a_reason() -> None:
    assert {each.name for each in fields(DecoderConfig)} == TOLD | UNTOLD.keys()


@pytest.mark.parametrize("setting", UNTOLD)
def test_a_setting_that_no_plan_tells_is_named_and_computed_layer_by_layer(
    library: ctypes.CDLL, setting: str
) -> None:
    model, ids = made(**UNTOLD[setting]), [1, 2, 3, 4, 5]
    assert model.native is None
    assert setting in str(why_not(model))
    output = model.step([StepInput(0, ids)], model.new_state())
    torch.testing.assert_close(output.logits, model(torch.tensor([ids]))[0], rtol=1e-4, atol=1e-5)


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


def test_only_the_first_of_several_reasons_was_named(library: ctypes.CDLL) -> None:
    changes = UNTOLD["residual"] | {"norm": "layer", "gated_mlp": False, "norm_eps": 1e-5}
    model = made(**changes, rope=RopeConfig(partial_rotary_factor=0.5))
    reasons = ("residual", "only RMS norms", "only gated SiLU", "only a part turns")
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
    assert "not packed" in str(step.why_not(replace(plan, head=None)))
    half = replace(plan, embedding=plan.embedding.half())
    assert "torch.float16" in str(step.why_not(half))
    monkeypatch.setattr(step, "load", lambda: Found(None, "torch", "a test"))
    assert step.why_not(plan) == "a test"
