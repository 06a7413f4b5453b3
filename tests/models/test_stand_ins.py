"""Mixers that take the place of softmax in a trained model: `--attention`."""

from __future__ import annotations

import pytest
from checkpoints import tiny_tokenizer
from helpers import MIXER_NAMES, assert_close, full_logits, random_tokens, tiny_model

from linspec import LLM, SamplingParams
from linspec.errors import ConfigError
from linspec.mixers import MIXERS
from linspec.mixers.specs import make_mixer
from linspec.models.sparse import sparse_mixer, with_sparse_attention

SPECS = (
    "h2o:budget=5,group=4",
    "snapkv:budget=5,group=4,last=2,pool=3",
    "streaming:group=4,span=2,sinks=3",
    "delta:threshold=0.7,group=4",
    "shadow:rank=3,budget=2,group=4,chunk=2",
    "pages:budget=4,group=4,page=2",
    "pages:budget=4,group=4,page=2,judge=bounds",
)
TEXT = random_tokens(23)


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_with_it_is_the_model_that_was_made_with_it(spec: str) -> None:
    plain = tiny_model("softmax", taps=0)
    made, other = with_sparse_attention(plain, spec), tiny_model(make_mixer(spec), make_mixer(spec))
    other.load_state_dict(plain.state_dict())
    assert made.config == other.config
    assert_close(full_logits(made, [TEXT]), full_logits(other, [TEXT]))
    assert float((full_logits(made, [TEXT]) - full_logits(plain, [TEXT])).abs().max()) > 1e-3


def test_all_that_can_take_the_place_of_softmax_have_no_weights_of_their_own() -> None:
    names = [name for name in MIXERS.names() if MIXERS[name].stands_in]
    assert {spec.partition(":")[0] for spec in SPECS} <= set(names)
    softmax = dict(tiny_model("softmax", taps=0).named_parameters())
    for name in names:
        if name in MIXER_NAMES:
            assert dict(tiny_model(name, taps=0).named_parameters()).keys() == softmax.keys()


@pytest.mark.parametrize("name", ["aug", "softmax", "linformer", "by-head"])
def test_others_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"one of delta, h2o, .*streaming.* got '{name}'"):
        sparse_mixer(name)


@pytest.mark.parametrize("spec", SPECS)
def test_the_exact_heads_of_a_layer_get_it_too(spec: str) -> None:
    model = with_sparse_attention(tiny_model("by-head", taps=0), spec)
    state = model.new_state()
    assert [mixer.options["exact"] for mixer in model.config.mixers] == [spec, spec]
    assert state.bytes(0) > 0
    assert full_logits(model, [TEXT]).isfinite().all()


@pytest.mark.parametrize("spec", SPECS[:2])
def test_drafts_change_nothing_of_what_it_says(spec: str) -> None:
    model = tiny_model("softmax", taps=0)
    params = SamplingParams(max_tokens=12)
    alone, drafted = (
        LLM(model, tokenizer=tiny_tokenizer(), attention=spec, drafter=drafter).generate(
            [TEXT], params
        )
        for drafter in ("none", "prompt-lookup")
    )
    assert [each.token_ids for each in alone] == [each.token_ids for each in drafted]


def test_a_misspelt_attention_is_answered_by_those_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"attention is one of .*did you mean 'pages'\?$"):
        sparse_mixer("page:budget=512")
