"""Layers whose KV heads differ: every choice of exact heads, with norms of queries and keys."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from helpers import GROUP, assert_close, mixer_config, random_tokens, random_tree, tiny_model

from linspec.decoding.step import StepInput
from linspec.errors import ConfigError, LinspecError
from linspec.mixers.by_head import beside_exact
from linspec.mixers.config import MixerConfig
from linspec.models.decoder import Decoder

KV_HEADS = 4
CHOICES = [heads for n in range(KV_HEADS + 1) for heads in itertools.combinations(range(4), n)]


def layer(*exact: int, taps: int = 0) -> MixerConfig:
    base = mixer_config("by-head", taps)
    return MixerConfig(
        name="by-head", group=GROUP, span=2, sinks=base.sinks, taps=taps, exact_heads=exact
    )


def model_of(*mixers: MixerConfig, **options: object) -> Decoder:
    return tiny_model(*mixers, kv_heads=KV_HEADS, qk_norm=True, **options)


@torch.no_grad()
def nodes_and_full(model: Decoder, kv: str = "float") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a tree that crosses group borders behind a prompt: step form, full form."""
    prompt = random_tokens(3 * GROUP + 2)
    tree = random_tree(random.Random(1), 17, reach=3)
    state = model.new_state(kv=kv)
    model.step([StepInput(0, prompt)], state)
    state.commit(0, range(len(prompt)))
    found = model.step([StepInput.tree(0, tree)], state).logits
    texts = [[*prompt, *(tree.tokens[at] for at in tree.path_to(node))] for node in range(17)]
    return found, torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])


@pytest.mark.crossed(2)
@pytest.mark.parametrize("exact", CHOICES, ids=str)
@pytest.mark.parametrize("taps", [0, 3])
def test_any_choice_of_heads_has_one_function_in_two_forms(
    exact: tuple[int, ...], taps: int
) -> None:
    assert_close(*nodes_and_full(model_of(layer(*exact, taps=taps), layer(taps=taps))))


@pytest.mark.parametrize("others", ["grouped", "aug", "gla", "gdn", "hedgehog", "relu", "local"])
@pytest.mark.parametrize("exact", [(1,), (0, 3)], ids=str)
def test_other_heads_may_have_another_mixer(others: str, exact: tuple[int, ...]) -> None:
    mixed = beside_exact(mixer_config(others), exact)
    assert_close(*nodes_and_full(model_of(mixed, mixed)))


@pytest.mark.parametrize("others", ["grouped", "aug", "gla", "gdn", "hedgehog", "relu", "local"])
@torch.no_grad()
def test_other_heads_compute_in_the_kernels_what_they_do_without(others: str) -> None:
    """Float32 in its inference form, as it is served: pieces of a prompt against the full form."""
    mixed = beside_exact(mixer_config(others), (1,))
    model = model_of(mixed, mixed).float().eval()
    prompt = random_tokens(3 * GROUP + 2)
    whole = model(torch.tensor([prompt]))[0]
    state = model.to_inference().new_state()
    found = []
    for piece in (prompt[: GROUP + 1], prompt[GROUP + 1 :]):
        found.append(model.step([StepInput(0, piece, all_logits=True)], state).logits)
        state.commit(0, range(len(piece)))
    torch.testing.assert_close(torch.cat(found), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("others", ["by-head", "nonsense"])
def test_other_heads_need_a_mixer_that_has_heads_to_itself(others: str) -> None:
    with pytest.raises(LinspecError, match=others):
        model_of(*[MixerConfig(name="by-head", exact_heads=(0,), options={"others": others})] * 2)


def test_all_heads_exact_are_softmax_and_none_are_streaming() -> None:
    ids = torch.tensor([random_tokens(5 * GROUP)])
    streaming = MixerConfig(name="streaming", group=GROUP, span=2, sinks=layer().sinks)
    for exact, plain in (((0, 1, 2, 3), MixerConfig()), ((), streaming)):
        mixed, whole = model_of(layer(*exact), layer(*exact)), model_of(plain, plain)
        whole.load_state_dict(mixed.state_dict())
        assert_close(mixed(ids), whole(ids))


def test_the_inference_form_is_the_same_function() -> None:
    plain, ready = (model_of(layer(1, 2, taps=3), layer(0), dtype=torch.float32) for _ in range(2))
    ready.to_inference()
    assert_close(nodes_and_full(ready)[0], nodes_and_full(plain)[1], atol=1e-4)


def test_near_sighted_heads_are_kept_as_the_exact_ones() -> None:
    model = model_of(layer(1), layer(0, 3), dtype=torch.float32)
    parts = model.new_state(kv="int8").parts
    kept = {(part.spec.kv_heads, part.entries.name) for part in parts}
    assert kept == {(1, "int8"), (3, "int8"), (2, "int8")}
    found, full = nodes_and_full(model, kv="int8")
    assert 0 < float((found - full).abs().max()) < 0.1


def test_layers_with_equal_parts_share_them() -> None:
    """Which heads are exact does not matter to a state, only how many."""
    state = model_of(layer(1), layer(3), layer(0, 2)).new_state()
    assert sorted(part.layers for part in state.parts) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("exact", "message"),
    [((4,), "they are 0..3"), ((2, 1), "rising order"), ((1, 1), "rising order"), ((-1,), "0")],
)
def test_heads_that_are_not_there_are_named(exact: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(layer(*exact), layer())
