"""Every verb that decodes takes `--attention`, and a store of prefixes tells such models apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from linspec import LLM
from linspec.bench.drafters import bench_drafters
from linspec.bench.speed import bench
from linspec.checkpoints.attention import attending
from linspec.cli.options import Decoding, Loading
from linspec.cli.serve import Drafting
from linspec.cli.verify import verify as verify_verb
from linspec.engine.prefix_store import model_key
from linspec.evaluate.lossless import verify
from linspec.evaluate.perplexity import evaluate_source
from linspec.evaluate.ruler import evaluate_ruler
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.sparse import with_sparse_attention

SPEC = "pages:budget=128,group=64,span=2"


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(
            vocab_size=97, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=48
        )
    ).eval()


@pytest.mark.parametrize("options", [Decoding, Drafting, Loading])
def test_options_hand_the_attention_on(options: Any) -> None:
    assert options(attention=SPEC).to_library()["attention"] == SPEC
    assert options().to_library()["attention"] is None


@pytest.mark.parametrize("options", [Decoding, Drafting, Loading])
def test_options_hand_the_scaling_of_positions_on(options: Any) -> None:
    assert options(rope_scaling="yarn:4").to_library()["rope_scaling"] == "yarn:4"


@pytest.mark.parametrize("function", [bench, bench_drafters, evaluate_source, evaluate_ruler, LLM])
def test_functions_of_verbs_take_the_scaling_too(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert parameters["rope_scaling"].default is parameters["attention"].default is None


@pytest.mark.parametrize("function", [verify, verify_verb, bench, bench_drafters, evaluate_source])
def test_functions_of_verbs_take_it(function: Callable[..., Any]) -> None:
    assert inspect.signature(function).parameters["attention"].default is None


def test_prefix_stores_tell_models_of_other_attention_apart() -> None:
    plain = model().to_inference()
    keys = set()
    for each in (plain, with_sparse_attention(plain, SPEC), with_sparse_attention(plain, "pages")):
        keys.add(model_key(each, each.new_state(1, "float"), "float"))
    assert len(keys) == 3
    assert attending(plain, None) is plain
