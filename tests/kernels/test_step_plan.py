"""What a model says to the kernels, and what these say to it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch

from linspec.decoding.step import StepInput
from linspec.kernels.cpu import step
from linspec.kernels.cpu.library import Found
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.step_plan import step_plan, why_not

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
