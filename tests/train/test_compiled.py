"""A compiled step is a second implementation: its gradients are those of the plain one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from linspec.drafters.block_net import BlockNet
from linspec.drafters.heads import HeadsConfig, MedusaHeads
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.ops.blocks import split, windows
from linspec.models.bert import Bert
from linspec.models.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from linspec.models.decoder import Decoder
from linspec.models.flash import Flash
from linspec.models.flash_config import FlashConfig
from linspec.models.t5 import T5
from linspec.train import pieces
from linspec.train.compiled import (
    CompiledLoss,
    compare,
    compile_loss,
    float32_gradients,
    gradients,
)
from linspec.train.drafters.block import BlockTrainingOptions, block_loss
from linspec.train.drafters.eagle import EagleTraining, EagleTrainingOptions
from linspec.train.drafters.medusa import heads_loss
from linspec.train.drafters.states import states_of
from linspec.train.finetune import finetune_loss
from linspec.train.pieces import Labels, Output, Teacher, loss_in_pieces
from studies.linearized_llm.seq2seq import tiny_t5
from tests.helpers import randomise

# behind a graph break (padding of an encoder, norms in torch 2.11) the compiler looks at gradients of
# inner tensors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")

VOCAB, ROWS = 37, 2
# the ways of a mixer to weigh what it sees exactly, where it has more than its own
KERNELS = {"own": ("own",), "softmax": ("softmax",), "both": ("own", "softmax")}
MIXER_KERNELS = [
    (name, kernel)
    for name in MIXERS.names()
    if not name.startswith(("test", "study"))
    for kernel in KERNELS["both" if name in ("local", "grouped", "aug", "gla", "gdn") else "own"]
]
CONTEXTS, GROUPS, SPANS, TAPS = (40, 64, 130), (16, 24, 64), (1, 2, 4), (1, 4, 33)
Case = tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor], int]


@pytest.fixture(autouse=True)
def fresh_graphs(two_threads: None) -> None:
    """Graphs of this test alone, on two threads: with one, wrong graphs computed right gradients."""
    torch._dynamo.reset()


def numbered(cases: Iterable[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """Each case with its number in a list."""
    return [(number, *case) for number, case in enumerate(cases)]


def covering(
    number: int, name: str, kernel: str, *, causal: bool = True
) -> tuple[int, list[MixerConfig]]:
    """The context and the mixer of case `number` of a list.

    Nine neighbouring cases pair every context, group, span and number of taps with every other.
    """
    a, b = number % 3, number // 3 % 3
    # in an encoder linformer sees every group
    rows = {"features": 4, "keep": 2 * causal} if name == "linformer" else {}
    mixer = MixerConfig(
        name=name,
        group=GROUPS[b],
        span=1 if name == "global" else SPANS[(a + b) % 3],
        kernel=kernel,
        taps=TAPS[(a + 2 * b) % 3],
        window=GROUPS[b] if name == "window" else 0,
        **rows,
    )
    return CONTEXTS[a], [mixer]


def decoder(*mixers: MixerConfig) -> Decoder:
    shape = DecoderConfig(
        vocab_size=VOCAB,
        width=32,
        layers=len(mixers),
        heads=4,
        kv_heads=2,
        head_width=16,
        mlp_width=32,
        mixers=mixers,
    )
    return randomise(Decoder(shape), 0)


def bert(*mixers: MixerConfig) -> Bert:
    shape = EncoderConfig(
        vocab_size=VOCAB,
        width=32,
        layers=len(mixers),
        heads=2,
        kv_heads=2,
        head_width=16,
        mlp_width=32,
        mixers=mixers,
    )
    return randomise(Bert(shape), 0)


def t5(*mixers: MixerConfig) -> T5:
    shape: Seq2SeqConfig = tiny_t5(VOCAB, 0)
    half = {"width": 32, "layers": len(mixers), "mixers": mixers, "mlp_width": 32}
    return randomise(
        T5(
            replace(
                shape,
                # there linformer sees every group
                encoder=replace(
                    shape.encoder,
                    **{**half, "mixers": tuple(replace(each, keep=0) for each in mixers)},
                ),
                decoder=replace(shape.decoder, **half),
            )
        ),
        0,
    )


def decoder_case(mixers: list[MixerConfig], context: int) -> Case:
    model, teacher = decoder(*mixers), decoder(MixerConfig()).requires_grad_(False)
    return model, partial(finetune_loss, model, teacher=teacher, kl_weight=1.0), context


def bert_case(mixers: list[MixerConfig], context: int) -> Case:
    model = bert(*mixers)
    real = torch.ones(ROWS, context + 1, dtype=torch.bool)
    real[1, context // 2 :] = False

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(batch, real).square().mean()

    return model, loss, context


def t5_case(mixers: list[MixerConfig], context: int) -> Case:
    model = t5(*mixers)
    return model, partial(finetune_loss, model), 2 * context


def flash_case(variant: str, context: int) -> Case:
    shape = FlashConfig(
        vocab_size=VOCAB,
        width=32,
        layers=2,
        head_width=16,
        turned=8,
        mlp_width=64,
        max_positions=512,
        variant=variant,
        group=24,
        taps=4 if variant == "aug" else 0,
    )
    model = randomise(Flash(shape), 0)
    return model, partial(finetune_loss, model), context


def heads_case(context: int) -> Case:
    target = decoder(MixerConfig()).requires_grad_(False)
    # as they are trained by default, and from a part of the vocabulary
    shape = HeadsConfig(
        width=32, vocab_size=VOCAB, heads=2, hidden=16, rooted=True, vocabulary=VOCAB // 2
    )
    heads = MedusaHeads(shape, target)
    heads.initialize(torch.Generator().manual_seed(0))

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return heads_loss(heads, states_of(target, batch), decay=0.8)

    return heads, loss, context


def block_case(context: int) -> Case:
    target = decoder(MixerConfig(), MixerConfig()).requires_grad_(False)
    shape = BlockTrainingOptions(places=3, depth=1, window=16, vocabulary=VOCAB // 2, rank=8)
    net = randomise(BlockNet(shape.shape_for(target.config), target), 0)
    layers = net.config.read

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return block_loss(net, states_of(target, batch, layers), every=2, decay=0.8)

    return net, loss, context


def eagle_case(context: int) -> Case:
    target = decoder(MixerConfig(), MixerConfig()).requires_grad_(False)
    training = EagleTraining(EagleTrainingOptions(vocabulary=VOCAB // 2))
    net = randomise(training.make(target, np.arange(VOCAB), 0), 0).requires_grad_(True)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return training.loss(net, states_of(target, batch, net.config.reads))

    return net, loss, context


def batch_of(context: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, VOCAB, (ROWS, context + 1), generator=torch.Generator().manual_seed(seed)
    )


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def assert_compiled_gradients_are_right(case: Case, narrow: bool = False) -> None:
    module, loss, context = case
    weights, batch = trained(module), batch_of(context)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        plain = gradients(loss, batch, weights)
        exact = float32_gradients(loss, batch, weights) if narrow else plain
        compiled = gradients(compile_loss(loss), batch, weights)
    wrong = [d for d in compare(exact, plain, compiled) if d.wrong]
    assert not wrong, wrong


# tokens, width, block, ahead: with overlapping views the first crashed, the next two were wrong by as
# much as the gradients themselves, the last was right
SHAPES = [(32, 16, 16, 16), (128, 64, 64, 64), (512, 64, 64, 192), (512, 64, 64, 31)]


def test_overlapping_windows_have_the_same_gradients_when_compiled() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{name}{i}": torch.randn(1, 2, shape[0], shape[1], generator=generator).requires_grad_()
        for i, shape in enumerate(SHAPES)
        for name in "qkv"
    }

    def loss(batch: torch.Tensor) -> torch.Tensor:
        total = batch.new_zeros((), dtype=torch.float32)
        # all in one graph: compiling takes longer than everything else
        for i, (_, _, block, ahead) in enumerate(SHAPES):
            q, k, v = (weights[f"{name}{i}"] for name in "qkv")
            scores = split(q, block) @ windows(k, None, ahead, block).mT
            total = total + (scores.softmax(-1) @ windows(v, None, ahead, block)).square().sum()
        return total

    batch = torch.zeros(1)
    plain = gradients(loss, batch, weights)
    compiled = gradients(compile_loss(loss), batch, weights)
    assert not [d for d in compare(plain, plain, compiled) if d.wrong]


def test_a_student_has_the_same_gradients_when_compiled() -> None:
    mixer = MixerConfig(name="aug", kernel="softmax", group=16, span=2, taps=4)
    model = decoder(mixer)
    assert_compiled_gradients_are_right((model, partial(finetune_loss, model), 40))


@pytest.mark.crossed(2)
@pytest.mark.parametrize("narrow", [False, True])
def test_a_loss_of_several_pieces_has_the_same_gradients_when_compiled(
    narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_LOGITS", 32 * VOCAB)
    assert_compiled_gradients_are_right(decoder_case([MixerConfig()], 40), narrow)


def test_a_loss_of_several_pieces_is_one_graph() -> None:
    states, head = torch.randn(ROWS, 5, 8, requires_grad=True), nn.Linear(8, VOCAB)
    output, ids = Output.of(head), torch.randint(VOCAB, (ROWS, 5))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return loss_in_pieces(x, output, Labels(ids), Teacher(x.detach(), output), piece=4)

    explained = torch._dynamo.explain(loss)(states)
    assert explained.graph_break_count == 0, explained.break_reasons


def test_a_partial_last_group_is_masked_when_compiled() -> None:
    mixer = MixerConfig(name="yoso", group=24)
    model = decoder(mixer)
    assert_compiled_gradients_are_right((model, partial(finetune_loss, model), 40))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "name", "kernel"), numbered(MIXER_KERNELS))
def test_compiled_decoder_steps_equal_plain_ones(number: int, name: str, kernel: str) -> None:
    context, mixers = covering(number, name, kernel)
    assert_compiled_gradients_are_right(decoder_case(mixers, context))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("number", "name", "kernel"),
    numbered(m for m in MIXER_KERNELS if MIXERS[m[0]].bidirectional()),
)
def test_compiled_encoder_steps_equal_plain_ones(number: int, name: str, kernel: str) -> None:
    context, mixers = covering(number, name, kernel, causal=False)
    assert_compiled_gradients_are_right(bert_case(mixers, context))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("number", "name", "kernel"),
    numbered(m for m in MIXER_KERNELS if MIXERS[m[0]].bidirectional() and MIXERS[m[0]].causal),
)
def test_compiled_t5_steps_equal_plain_ones(number: int, name: str, kernel: str) -> None:
    context, mixers = covering(number, name, kernel)
    assert_compiled_gradients_are_right(t5_case(mixers, context))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("variant", ["quadratic", "local", "grouped", "aug"])
def test_compiled_flash_steps_equal_plain_ones(variant: str, context: int) -> None:
    assert_compiled_gradients_are_right(flash_case(variant, context))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("context", CONTEXTS)
def test_compiled_steps_of_drafter_heads_equal_plain_ones(context: int) -> None:
    assert_compiled_gradients_are_right(heads_case(context))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("context", CONTEXTS)
def test_compiled_steps_of_block_drafters_equal_plain_ones(context: int) -> None:
    assert_compiled_gradients_are_right(block_case(context))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("context", CONTEXTS)
def test_compiled_steps_of_an_unrolled_drafter_equal_plain_ones(context: int) -> None:
    assert_compiled_gradients_are_right(eagle_case(context))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "name", "kernel"), numbered(MIXER_KERNELS))
def test_compiled_bfloat16_steps_round_like_plain_ones(number: int, name: str, kernel: str) -> None:
    context, mixers = covering(number, name, kernel)
    case = decoder_case(mixers, context)
    assert_compiled_gradients_are_right(case, narrow=True)


@pytest.mark.crossed(3)
@pytest.mark.parametrize(("number", "name", "kernel"), numbered(MIXER_KERNELS))
def test_bfloat16_gradients_point_where_float32_gradients_do(
    number: int, name: str, kernel: str
) -> None:
    model, loss, context = decoder_case(covering(number, name, kernel)[1], CONTEXTS[0])
    weights, batch = trained(model), batch_of(context)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gradients(loss, batch, weights)
        wide = float32_gradients(loss, batch, weights)
    flat = [torch.cat([found[n].flatten() for n in sorted(wide)]) for found in (narrow, wide)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return 1.001 * grad


def test_a_wrong_compiled_gradient_beside_a_right_loss_leaves_the_run_plain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = nn.Linear(3, 3)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return module(x).square().sum()

    monkeypatch.setattr(torch, "compile", lambda f, **o: lambda x: _WrongBackward.apply(f(x)))
    compiled = CompiledLoss(loss, trained(module), "test")
    with caplog.at_level(logging.WARNING, "linspec"):
        compiled(torch.ones(2, 3)).backward()
    assert not compiled.compiled
    assert "2 of 2 weights are wrong" in caplog.text and "steps are not compiled" in caplog.text
    exact = gradients(loss, torch.ones(2, 3), trained(module))
    assert torch.equal(module.weight.grad, exact["weight"])


def test_every_new_shape_of_a_batch_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = nn.Linear(3, 3), []

    def loss(x: torch.Tensor) -> torch.Tensor:
        return module(x).square().sum()

    def compile_(f: object, **options: object) -> object:
        assert options["dynamic"] is False
        return lambda x: calls.append(tuple(x.shape)) or loss(x)

    monkeypatch.setattr(torch, "compile", compile_)
    compiled = CompiledLoss(loss, trained(module), "test")
    for rows in (4, 4, 1, 4, 1):
        compiled(torch.ones(rows, 3))
    assert calls == [(4, 3)] * 3 + [(1, 3)] * 2 + [(4, 3), (1, 3)]


def test_the_cases_pair_every_context_group_span_and_taps() -> None:
    cases = [covering(number, "aug", "softmax") for number in range(9)]
    made = [(context, mixer.group, mixer.span, mixer.taps) for context, (mixer,) in cases]
    for first, second in combinations(range(4), 2):
        assert len({(case[first], case[second]) for case in made}) == 9


def test_a_scalar_that_rounds_little_by_chance_is_no_wrong_gradient() -> None:
    exact = {"many": torch.ones(1000), "one": torch.ones(1)}
    plain = {"many": torch.ones(1000) * 1.004, "one": torch.ones(1)}
    assert not any(d.wrong for d in compare(exact, plain, {**plain, "one": torch.tensor([1.005])}))
    wrong = compare(exact, plain, {**plain, "one": torch.tensor([1.05])})
    assert [d.name for d in wrong if d.wrong] == ["one"]


def test_a_gradient_that_is_missing_or_not_a_number_is_wrong() -> None:
    one = {"a": torch.ones(2)}
    assert not any(d.wrong for d in compare(one, one, one))
    assert all(d.wrong for d in compare(one, one, {}))
    assert all(d.wrong for d in compare(one, one, {"a": torch.full((2,), float("nan"))}))
    assert all(d.wrong for d in compare(one, one, {"a": torch.tensor([1.0, 1.001])}))
