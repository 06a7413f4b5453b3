"""A model drafts for itself: forms that share its weights, on its own state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checkpoints import text_model, tiny_tokenizer
from helpers import (
    assert_close,
    assert_same_bytes,
    feed,
    mixer_config,
    prefilled,
    random_tokens,
    randomise,
    tiny_config,
    tiny_model,
)
from test_engine import decode, outputs

from linspec.checkpoints.load_quantized import quantize_model
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import StepInput
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.base import Drafter
from linspec.errors import ConfigError, DrafterError
from linspec.llm import LLM
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder
from linspec.models.own_forms import near_sighted, rounded, skipping

SPECS = (
    "self-pages:budget=4,group=4,tokens=5",
    "self-pages:budget=4,group=4,tokens=5,judge=bounds",
    "self-window:window=8,sinks=1,tokens=5",
    "self-window:window=4,sinks=0,least=0",
    "self-bits:4",
    "self-bits:8",
)
PROMPTS = [random_tokens(n, seed=n) for n in (1, 5, 12, 40, 90)]
LENGTHS = (1, 12, 25, 20, 15)


def f32(*mixers: str, **switches: object) -> Decoder:
    return tiny_model(*mixers, dtype=torch.float32, **switches)


# what computes the steps: one call, int8 weights in one call, or torch layer by layer
MODELS: dict[str, Callable[[], Decoder]] = {
    "softmax": lambda: f32("softmax").to_inference(),
    "aug and softmax": lambda: f32("aug", "softmax", "gdn").to_inference(),
    "by-head": lambda: f32("by-head", "softmax").to_inference(),
    "aug": lambda: f32("aug").to_inference(),
    "int8": lambda: quantize_model(f32("softmax", "aug"), 8, {}),
    "float64": lambda: tiny_model("softmax", "aug").to_inference(),
    "not prepared": lambda: f32("softmax", "aug"),
}


def drafter_of(spec: str, model: Decoder) -> Drafter:
    drafter = make_drafter(spec, DrafterContext(model, slots=4))
    assert drafter is not None
    return drafter


def fitting(kind: str, spec: str) -> tuple[Decoder, Drafter]:
    model = MODELS[kind]()
    try:
        return model, drafter_of(spec, model)
    except DrafterError as error:
        pytest.skip(str(error))


@pytest.mark.crossed(9)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_are_those_of_plain_decoding_token_for_token(
    kind: str, spec: str, temperature: float
) -> None:
    model, drafter = fitting(kind, spec)
    params = [
        SamplingParams(max_tokens=n, temperature=temperature, top_p=0.9, seed=n) for n in LENGTHS
    ]
    plain = [outputs(decode(model, [p], each))[0] for p, each in zip(PROMPTS, params, strict=True)]
    rows = decode(model, PROMPTS, params, drafter)
    assert outputs(rows) == plain
    assert sum(row.stats.accepted for row in rows) > 0
    alone = drafter_of(spec, model)
    assert outputs(decode(model, PROMPTS, params, alone, slots=1)) == plain


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_a_copy_in_eight_bits_is_nearly_always_right_also_where_the_request_samples(
    temperature: float,
) -> None:
    model = f32("softmax", "aug").to_inference()
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=3)
    rows = decode(model, PROMPTS, params, drafter_of("self-bits:bits=8,least=0", model))
    tried = sum(sum(row.stats.tried) for row in rows)
    assert sum(sum(row.stats.hits) for row in rows) > 0.85 * tried


@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_window_over_a_cache_in_eight_bits(kv: str, temperature: float) -> None:
    model = text_model("softmax")
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=5, ignore_eos=True)
    settings = {"tokenizer": tiny_tokenizer(), "kv_cache_dtype": "auto" if kv == "float" else kv}
    texts = ["abcd end the abcd", "def f(x): return the end"]
    plain = LLM(model, **settings).generate(texts, params)
    drafter = "self-window:window=8,sinks=2"
    drafted = LLM(model, drafter=drafter, policy=4, **settings).generate(texts, params)
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("length", [0, 1, 3, 11, 37])
def test_a_near_sighted_layer_reads_of_a_cache_what_streaming_keeps(
    dtype: torch.dtype, sinks: int, length: int
) -> None:
    """In one layer keys and values do not depend on what attention saw."""
    model = tiny_model(MixerConfig(taps=3), MixerConfig(taps=3), dtype=dtype)
    model = one_layer(model)
    mixer = MixerConfig(name="streaming", group=4, span=2, sinks=sinks, taps=3)
    other = Decoder(tiny_config(mixer)).to(dtype)
    other.load_state_dict(model.state_dict())
    model.to_inference(), other.eval().to_inference()
    near = near_sighted(model, group=4, span=2, sinks=sinks)
    assert (near.native is None) == (dtype == torch.float64)
    prompt, chain = random_tokens(length, seed=2), random_tokens(9, seed=3)
    state, kept = prefilled(model, prompt), other.new_state()
    feed(other, kept, prompt)
    got = near.step([StepInput(0, chain)], state).logits
    expected = other.step([StepInput(0, chain)], kept).logits
    assert_close(got, expected, 1e-10 if dtype == torch.float64 else 1e-5)


def one_layer(model: Decoder) -> Decoder:
    made = Decoder(tiny_config(model.config.mixers[0])).to(model.dtype)
    made.load_state_dict(model.state_dict(), strict=False)
    return made.eval()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"norms": "both"},
        {"norms": "behind"},
        {"residual": "parallel", "norm": "layer"},
        {"residual": "parallel-shared"},
        {"norms": "both", "residual_scale": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("chain", [5, 80])
def test_what_is_skipped_adds_nothing(
    native: bool, switches: dict[str, object], chain: int
) -> None:
    dtype = torch.float32 if native else torch.float64
    config = replace(tiny_config(*map(mixer_config, ("softmax", "aug", "softmax"))), **switches)
    model = randomise(Decoder(config), 4).to(dtype)
    silent = copy.deepcopy(model)
    mixers, mlps = {1, 2}, {0, 1}
    with torch.no_grad():
        for layer, block in enumerate(silent.layers):
            for part, out, skipped in (("mixer", "o", mixers), ("mlp", "down", mlps)):
                if layer in skipped:
                    getattr(getattr(block, part), out).weight.zero_()
                    for bias in (getattr(getattr(block, f"{part}_out_norm", None), "bias", None),):
                        if bias is not None:
                            bias.zero_()
    model.to_inference(), silent.to_inference()
    thin = skipping(model, mixers, mlps)
    assert (thin.native is not None) == native
    tokens = random_tokens(chain, seed=1)
    got = thin.step([StepInput(0, tokens)], model.new_state()).logits
    expected = silent.step([StepInput(0, tokens)], silent.new_state()).logits
    assert_close(got, expected, 1e-5 if native else 1e-10)


@pytest.mark.parametrize("kind", ["softmax", "aug and softmax", "float64"])
def test_forms_share_weights_and_leave_model_and_state_as_they_are(kind: str) -> None:
    model = MODELS[kind]()
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    state = prefilled(model, random_tokens(23, seed=1))
    expected = model.step([StepInput(0, [3, 4])], state).logits
    state.drop(0)
    copies = state.snapshot(0)
    forms = {
        "near": near_sighted(model, group=4, span=2, sinks=1),
        "thin": skipping(model, {0}, {1}),
    }
    if kind != "float64":
        forms["rough"] = rounded(model, 4)
    for name, form in forms.items():
        found = form.step([StepInput(0, [3, 4])], state).logits
        assert not torch.equal(found, expected)
        state.drop(0)
        assert_same_bytes(state.snapshot(0), copies)
        own = {t.data_ptr() for t in form.state_dict().values()} - {a for a, _ in before.values()}
        assert bool(own) == (name == "rough")
    assert torch.equal(model.step([StepInput(0, [3, 4])], state).logits, expected)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])


REFUSED = {
    "self-window": (lambda: f32("aug"), "this model has none"),
    "self-bits:8": (lambda: quantize_model(f32("softmax"), 8, {}), "have 8.0 bits each"),
    "self-bits:4": (lambda: quantize_model(f32("softmax"), 4, {}), "have 4.5 bits each"),
    "self-bits": (lambda: tiny_model("softmax"), "float64 on cpu"),
}


@pytest.mark.parametrize("spec", REFUSED)
def test_a_model_that_gains_nothing_is_refused_with_the_reason(spec: str) -> None:
    make, message = REFUSED[spec]
    with pytest.raises(DrafterError, match=message):
        make_drafter(spec, DrafterContext(make()))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("self-window:window=10", "multiple of 4"),
        ("self-window:window=8,sinks=3", "sinks=3"),
        ("self-bits:3", "3"),
        ("self-bits:tokens=0", "tokens must be 1 or more"),
        ("self-bits:least=2", "share in 0..1"),
    ],
)
def test_settings_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_drafter(spec, DrafterContext(f32("softmax")))


@pytest.mark.parametrize("spec", ["suffix+self-bits:8", "self-window:window=8,sinks=1+self-bits:4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_self_drafts_in_a_mix_know_their_engine(spec: str, temperature: float) -> None:
    model = f32("softmax", "aug").to_inference()
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=2)
    rows = decode(model, PROMPTS, params, drafter_of(spec, model))
    assert outputs(rows) == outputs(decode(model, PROMPTS, params))
    assert sum(row.stats.accepted for row in rows) > 0


def test_a_drafter_without_an_engine_says_so() -> None:
    drafter = drafter_of("self-window", f32("softmax"))
    with pytest.raises(DrafterError, match="give it to an LLM"):
        drafter.propose([], [])
