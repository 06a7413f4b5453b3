"""A step of static shape whose softmax layers read by the kernel, against the step by layers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from linspec.checkpoints.load_quantized import load_for
from linspec.decoding.step import StepInput
from linspec.errors import ConfigError
from linspec.kernels.cpu.linear import plain_weight
from linspec.kernels.gpu.choice import device_linear, kernels_for
from linspec.kernels.gpu.triton.available import SWITCH
from linspec.mixers.config import MixerConfig
from linspec.mixers.projections import LinearFactory
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer, fused_linear
from linspec.models.native_linear import NativeLinear
from linspec.models.static_step import StaticStep
from linspec.state.sinks import SinkSpec
from tests.helpers import assert_close, assert_same_bytes, feed, random_tree, randomise

pytest.importorskip("triton", reason="triton is not installed: pip install 'linspec[gpu]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test asks for them."""
    monkeypatch.setenv(SWITCH, "on")


GROUPS = {"group": 4, "span": 2}
MIXERS = {
    "softmax": MixerConfig(),
    "softmax with a convolution": MixerConfig(taps=3),
    "window": MixerConfig(name="window", window=5),
    "local": MixerConfig(name="local", **GROUPS),
    "grouped": MixerConfig(name="grouped", **GROUPS),
    "aug": MixerConfig(name="aug", taps=7, group=4),
    "aug:softmax": MixerConfig(name="aug", taps=3, kernel="softmax", **GROUPS),
    "relu": MixerConfig(name="relu", **GROUPS),
    "relu:relu2": MixerConfig(name="relu", kernel="relu2", group=4),
    "transnormer": MixerConfig(name="transnormer", group=4),
    "transnormer:softmax": MixerConfig(name="transnormer", kernel="softmax", **GROUPS),
    "gla": MixerConfig(name="gla", group=4),
    "gla:softmax": MixerConfig(name="gla", kernel="softmax", **GROUPS),
    "gdn": MixerConfig(name="gdn", **GROUPS),
    "gdn:softmax": MixerConfig(name="gdn", kernel="softmax", **GROUPS),
    "by-head": MixerConfig(
        name="by-head", group=4, exact_heads=(1,), options={"others": "gla"}, taps=2
    ),
    "streaming": MixerConfig(name="streaming", group=4, sinks=3),
    "streaming with a convolution": MixerConfig(name="streaming", sinks=2, taps=3, **GROUPS),
}


def models_of(
    mixer: str, linear_factory: LinearFactory = fused_linear, **changes: object
) -> tuple[Decoder, Decoder]:
    """A model by layers, and one whose steps are of static shape and have the kernels."""
    config = DecoderConfig(
        vocab_size=31, width=32, layers=2, heads=4, kv_heads=2, head_width=16, mlp_width=24,
        mixers=(MIXERS[mixer],) * 2, **changes,
    )  # fmt: skip
    with torch.device(DEVICE):
        plain, static = (Decoder(config) for _ in range(2))
    for model in (plain, static):
        randomise(model, 0)
        model.to_inference(linear_factory)
    kernels = kernels_for(static.device, static.dtype, config.head_width)
    assert kernels is not None
    assert kernels.name == "triton"
    plain.native, static.native = None, StaticStep(static, None, kernels)
    return plain, static


@pytest.mark.parametrize("mixer", MIXERS)
def test_trees_of_several_slots_equal_the_step_by_layers(mixer: str) -> None:
    check_trees(*models_of(mixer))


def test_capped_scores_equal_those_by_layers() -> None:
    check_trees(*models_of("softmax", score_cap=3.0))


@pytest.mark.parametrize("kv", ["float16", "bfloat16", "int8"])
def test_caches_of_other_formats_are_read(kv: str) -> None:
    """Of 16 bits where they lie, of codes as floats; a key may be rounded to its other neighbour."""
    check_trees(*models_of("softmax"), kv=kv, atol=5e-3)
    check_trees(*models_of("streaming"), kv=kv, atol=5e-3)


def check_trees(plain: Decoder, static: Decoder, kv: str = "float", atol: float = 2e-5) -> None:
    """Trees and chains of slots in any order; what commits fold, row by row and by torch."""
    # the interpreter takes milliseconds for each row of a state
    longest = 70 if plain.config.mixers[0] == MixerConfig() else 10
    models, states = (plain, static), [m.new_state(3, kv) for m in (plain, static)]
    rng = random.Random(0)
    for slot in range(3):
        prompt = [rng.randrange(31) for _ in range(rng.randrange(1, longest))]
        for model, state in zip(models, states, strict=True):
            feed(model, state, prompt, slot)
    for chosen in ((1,), (0, 2), (0, 1, 2)):
        grown = {slot: random_tree(rng, rng.randint(1, 6)) for slot in chosen}
        inputs = [StepInput.tree(slot, tree) for slot, tree in grown.items()]
        one, other = (m.step(inputs, s) for m, s in zip(models, states, strict=True))
        assert_close(one.logits, other.logits, atol=atol)
        for slot, tree in grown.items():
            path = tree.path_to(rng.randrange(len(tree)))
            for state in states:
                state.commit(slot, path)
    for slot in range(3):
        for one, other in zip(*(state.snapshot(slot) for state in states), strict=True):
            # sinks are bytes of entries
            if one.sums is not None and not isinstance(one.spec, SinkSpec):
                assert_close(one.sums, other.sums, atol=2e-4)


@pytest.mark.parametrize("mixer", ["softmax", "window"])
def test_a_node_of_a_tree_reads_what_a_step_by_itself_does(mixer: str) -> None:
    """To rounding: queries come from products of torch, which rounds four rows in another way than one."""
    _, static = models_of(mixer)
    found: list[torch.Tensor] = []
    assert isinstance(static.native, StaticStep)
    kernels = static.native.kernels
    assert kernels is not None

    def watched(*given: object, **named: object) -> torch.Tensor:
        found.append(kernels.tree_attention(*given, **named))
        return found[-1]

    static.native = StaticStep(static, None, replace(kernels, tree_attention=watched))
    together, apart = static.new_state(1), static.new_state(1)
    for state in (together, apart):
        feed(static, state, list(range(20)))
    found.clear()
    static.step([StepInput(0, [3, 4, 5, 6], [-1, 0, 1, 0])], together)
    tree = found[0]
    for node, token in enumerate((3, 4, 5)):
        found.clear()
        static.step([StepInput(0, [token])], apart)
        apart.commit(0, [0])
        assert_close(found[0][:, :, :, 0], tree[:, :, :, node], atol=1e-6)


@pytest.mark.parametrize("mixer", ["softmax", "aug", "gla", "gdn:softmax", "streaming"])
def test_with_integer_weights_a_tree_has_the_bits_of_single_steps(
    mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products are kernels too, nodes of a tree get the logits of steps by themselves, bit for bit."""
    monkeypatch.setattr(NativeLinear, "forward", lambda self, x: device_linear(x, self.plan()))
    _, static = models_of(mixer, Quantizer(8, {}))
    together, apart = (static.new_state(1) for _ in range(2))
    for token in (7, 8, 9):
        static.step([StepInput(0, [token])], together)
        together.commit(0, [0])
    apart.restore(0, together.snapshot(0))
    # over the border of a group, which the single steps fold
    tree = static.step([StepInput(0, [3, 4, 5, 6, 7], [-1, 0, 1, 0, 2])], together)
    for node, token in ((0, 3), (1, 4), (2, 5), (4, 7)):
        single = static.step([StepInput(0, [token])], apart)
        apart.commit(0, [0])
        assert torch.equal(single.logits[0], tree.logits[node])
    together.commit(0, [0, 1, 2, 4])
    assert_same_bytes(together.snapshot(0), apart.snapshot(0))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 5, 64, 65])
def test_integer_weights_multiply_where_they_lie(bits: int, rows: int) -> None:
    linear = randomise(torch.nn.Linear(70, 45), 0)
    layer = Quantizer(bits, {})(linear)
    assert isinstance(layer, NativeLinear)
    plan = layer.to(DEVICE).plan()
    x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    wanted = torch.nn.functional.linear(x.double(), plain_weight(plan).double(), plan.bias.double())
    assert_close(device_linear(x, plan).double(), wanted, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_on_a_gpu(bits: int) -> None:
    on_gpu = load_for("embedded-aug", bits, device="cuda")
    assert isinstance(on_gpu.native, StaticStep)
    by_torch = load_for("embedded-aug", bits, device="cuda")
    by_torch.native = None
    ids = list(range(40, 60))
    found = [feed(model, model.new_state(1), ids) for model in (on_gpu, by_torch)]
    assert_close(found[0], found[1], atol=1e-3)


def test_what_the_kernel_does_not_take_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    with pytest.raises(
        ConfigError, match="at most 256 features; this model has torch.float32 and 300"
    ):
        kernels_for(device, torch.float32, 300)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        kernels_for(device, torch.float16, 64)
    monkeypatch.setenv(SWITCH, "off")
    assert kernels_for(device, torch.float16, 300) is None
