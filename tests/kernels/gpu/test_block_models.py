"""Models whose weights stay in the blocks of their GGUF file on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from linspec.checkpoints.gguf.model import load_gguf
from linspec.checkpoints.hub import load_model
from linspec.checkpoints.load_quantized import quantize_model
from linspec.decoding.step import StepInput
from linspec.kernels.cpu.library import load
from linspec.kernels.gpu.choice import device_linear, kernels_for
from linspec.kernels.gpu.plain.blocks import block_outputs
from linspec.kernels.gpu.triton.available import SWITCH
from linspec.models.block_embedding import BlockEmbedding
from linspec.models.decoder import Decoder
from linspec.models.native_linear import NativeLinear
from linspec.models.static_step import StaticStep
from tests.gguf_files import tiny
from tests.helpers import assert_close, feed

pytestmark = pytest.mark.skipif(load().library is None, reason=load().reason)
# a device without memory, on which all but the values is computed
META = torch.device("meta")


def left_behind(model: Decoder) -> list[str]:
    """Tensors of a model that are not on its device."""
    return [
        f"{type(module).__name__}.{name}"
        for module in model.modules()
        for held in (vars(module), module._buffers, module._parameters)
        for name, each in held.items()
        if isinstance(each, torch.Tensor) and each.device != model.device
    ]


def step_there(model: Decoder) -> None:
    """One step on a device: whatever meets must be there."""
    assert isinstance(model.native, StaticStep)
    assert not left_behind(model)
    state = model.new_state(2)
    found = model.step([StepInput(0, [3, 4, 5], (-1, 0, 0)), StepInput(1, [6])], state)
    assert found.logits.device == model.device


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["embedded-softmax", "embedded-aug"])
def test_a_quantized_model_goes_to_a_device_as_a_whole(name: str, bits: int) -> None:
    model = quantize_model(load_model(name), bits, {}).to(META)
    model.finalize_weights()
    step_there(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q6_K"])
def test_a_model_in_blocks_goes_to_a_device_as_a_whole(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")
    monkeypatch.setenv(SWITCH, "on")
    path = tiny("llama", tmp_path / "m.gguf", kind)[1]
    model = load_model(path, dtype=dtype, device=META, keep_blocks=True)
    assert isinstance(model.embed, BlockEmbedding)
    assert isinstance(model.head, NativeLinear)
    # a step of torch's operations, which need no values
    monkeypatch.setenv(SWITCH, "off")
    model.native = StaticStep(model, None)
    step_there(model)


def test_blocks_become_floats_unless_kernels_are_chosen(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m.gguf", "Q8_0")[1]
    model = load_model(path, dtype=torch.bfloat16, device=META, keep_blocks=True)
    assert not model.is_inference
    assert isinstance(model.embed, nn.Embedding)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q6_K"])
def test_a_step_in_blocks_equals_the_step_of_their_floats(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")
    monkeypatch.setenv(SWITCH, "on")
    path = tiny("llama", tmp_path / "m.gguf", kind, num_hidden_layers=1)[1]
    plain = load_model(path)
    # as it is loaded for a device; what layers do there they do here
    model = load_gguf(path, torch.float32, keep_blocks=True, device=META)
    monkeypatch.setattr(NativeLinear, "forward", lambda self, x: device_linear(x, self.plan()))
    monkeypatch.setattr(
        BlockEmbedding, "forward", lambda self, ids: block_outputs(self.plan(), ids)
    )
    kernels = kernels_for(model.device, model.dtype, model.config.head_width)
    plain.native, model.native = None, StaticStep(model, None, kernels)
    models, states = (plain, model), [each.new_state(1) for each in (plain, model)]
    found = [feed(each, state, [5, 6, 7]) for each, state in zip(models, states, strict=True)]
    size = found[0].abs().max()
    assert_close(*(each / size for each in found), atol=1e-5)
    tree = StepInput(0, [3, 4, 5, 6], (-1, 0, 0, 1))
    one, other = (each.step([tree], state) for each, state in zip(models, states, strict=True))
    assert_close(one.logits / size, other.logits / size, atol=1e-5)
