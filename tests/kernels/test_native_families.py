"""Settings of decoders beyond Llama's in the one-call step: against the step by layers, and bit for bit."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch

from linspec.decoding.step import StepInput
from linspec.kernels.cpu.library import instruction_sets
from linspec.mixers.config import MixerConfig
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer

LOCAL = MixerConfig(name="window", window=9)
SETTINGS: dict[str, dict[str, Any]] = {
    "layer-norm": {"norm": "layer"},
    "gelu": {"activation": "gelu", "gated_mlp": False, "mlp_bias": True},
    "gelu-tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu", "gated_mlp": False},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "learned": {"positions": "learned", "max_positions": 400},
    "partial": {"rope": RopeConfig(partial_rotary_factor=0.5)},
    "behind": {"norms": "behind"},
    "both": {"norms": "both", "norm_offset": True, "qk_norm": True},
    "parallel": {"residual": "parallel", "norm": "layer"},
    "parallel-shared": {"residual": "parallel-shared", "norm": "layer"},
    "multipliers": {"residual_scale": 0.3, "embedding_scale": 3.0, "logit_scale": 0.5},
    "scores": {"score_factor": 0.4, "score_cap": 1.5, "logit_cap": 2.0},
    "whole-norms": {"qk_norm": True, "qk_norm_of": "whole"},
    "each-norms": {"qk_norm": True, "qk_norm_of": "each"},
    "no-rope": {"layer_ropes": ("main", "none", "main")},
    "two-ropes": {
        "layer_ropes": ("local", "main", "local"),
        "local_rope": RopeConfig(theta=50.0, partial_rotary_factor=0.5),
        "mixers": (LOCAL, MixerConfig(), LOCAL),
    },
}
# as whole families have them
SETTINGS["gpt2"] = SETTINGS["layer-norm"] | SETTINGS["gelu"] | SETTINGS["biases"]
SETTINGS["gpt2"] |= SETTINGS["learned"] | {"activation": "gelu_tanh"}
SETTINGS["neox"] = (
    SETTINGS["gelu"] | SETTINGS["biases"] | SETTINGS["partial"] | SETTINGS["parallel"]
)
SETTINGS["gemma"] = SETTINGS["both"] | SETTINGS["scores"] | SETTINGS["two-ropes"]
SETTINGS["gemma"] |= SETTINGS["gelu-tanh"] | {"embedding_scale": 8.0}
SETTINGS["olmo"] = SETTINGS["behind"] | SETTINGS["whole-norms"]
TREE = [-1, 0, 0, 1, 3, 2, 4, 6, 7, 5]
PROMPT = [index * 31 % 97 for index in range(150)]


def made_of(changes: dict[str, Any], bits: int | None = None) -> Decoder:
    config = DecoderConfig(
        vocab_size=97, width=40, layers=3, heads=4, kv_heads=2, head_width=24, mlp_width=88
    )
    torch.manual_seed(0)
    model = Decoder(replace(config, **changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model.to_inference(Quantizer(bits, {})) if bits else model.to_inference()


@pytest.mark.crossed(3)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_in_one_call_is_the_setting_by_layers(
    library: ctypes.CDLL, setting: str, bits: int | None
) -> None:
    model = made_of(SETTINGS[setting], bits)
    assert model.native is not None
    native, results = model.native, []
    for form in (native, None):
        model.native = form
        state = model.new_state(2)
        outputs = [model.step([StepInput(1, PROMPT)], state)]
        state.commit(1, range(len(PROMPT)))
        tree = StepInput(1, list(range(len(TREE))), TREE)
        outputs.append(model.step([StepInput(0, [3, 4, 5], all_logits=False), tree], state))
        results.append([each for output in outputs for each in (output.hidden, output.logits)])
    for one, other in zip(*results, strict=True):
        if bits is None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        # one input of an integer layer that rounds the other way moves all that see its row by a hundredth
        assert (one - other).abs().mean() < 3e-2 * other.abs().mean()


@pytest.mark.crossed(2)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_has_one_set_of_bits(library: ctypes.CDLL, setting: str) -> None:
    """On all instruction sets; a prompt and its tokens one by one; a tree and a path of it."""
    model, before, results = made_of(SETTINGS[setting], 8), library.ls_isa(), []
    for name in instruction_sets(library):
        assert library.ls_use_isa(name.encode())
        whole, apart = model.new_state(), model.new_state()
        logits = model.step([StepInput(0, PROMPT[:70])], whole).logits
        whole.commit(0, range(70))
        for place, token in enumerate(PROMPT[:70]):
            alone = model.step([StepInput(0, [token])], apart).logits[0]
            apart.commit(0, [0])
            assert torch.equal(alone, logits[place])
        tree = model.step([StepInput(0, list(range(len(TREE))), TREE)], whole).logits
        for node in (0, 2, 5, 9):
            alone = model.step([StepInput(0, [node])], apart).logits[0]
            apart.commit(0, [0])
            assert torch.equal(alone, tree[node])
        results.append((logits, tree))
    assert library.ls_use_isa(before)
    assert all(
        torch.equal(*pair) for each in results for pair in zip(each, results[0], strict=True)
    )
