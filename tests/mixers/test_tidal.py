"""Positions that two layers select for all later ones: whole models against a loop in plain torch."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from helpers import (
    assert_close,
    feed,
    full_logits,
    prefilled,
    random_tokens,
    random_tree,
    tiny_config,
    tiny_model,
    tree_logits,
)
from test_engine import DRAFTERS, decode, outputs

from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import StepInput
from linspec.errors import ConfigError, StateError
from linspec.mixers.config import MixerConfig
from linspec.mixers.handed import handed, handing
from linspec.mixers.ops.exact import Exact
from linspec.mixers.softmax import Softmax
from linspec.models.decoder import Decoder
from linspec.models.own_forms import skipping
from linspec.models.sparse import with_sparse_attention

LAYERS, GROUP, SPAN, BUDGET = 5, 4, 2, 3
PLACES = [(0, 2), (1, 3), (2, 2), (1, 4)]


def plain_model(**switches: Any) -> Decoder:
    return tiny_model(*["softmax"] * LAYERS, **switches)


def sparse_model(first: int = 1, again: int = 3, budget: int = BUDGET, **switches: Any) -> Decoder:
    spec = f"tidal:budget={budget},group={GROUP},first={first},again={again}"
    return with_sparse_attention(plain_model(**switches), spec)


def start(t: int) -> int:
    """The oldest position of the span of t."""
    return max(0, t // GROUP - SPAN + 1) * GROUP


def by_hand(model: Decoder, ids: list[int], first: int, again: int) -> torch.Tensor:
    """Logits [T, vocab] of the model: layer by layer, token by token, head by head."""
    x = model.embed(torch.tensor(ids))
    rope = model.rotary(torch.arange(len(ids)), x.dtype)
    chosen: dict[tuple[int, int], list[int]] = {}
    for layer, block in enumerate(model.layers):
        mixer = block.mixer
        q, k, v = mixer.to_features(*mixer.split_heads(block.mixer_norm(x)), rope)
        out = torch.zeros_like(q)
        repeats = mixer.heads // mixer.kv_heads
        for t in range(len(ids)):
            for shared in range(mixer.kv_heads):
                heads = range(shared * repeats, (shared + 1) * repeats)
                if layer in (first, again):
                    score = [
                        max(float(q[t, head] @ k[s, shared]) for head in heads)
                        for s in range(start(t))
                    ]
                    order = sorted(range(start(t)), key=lambda s: -score[s])
                    chosen[t, shared] = order[:BUDGET]
                seen = list(range(t + 1))
                if layer > first and layer != again:
                    seen = [s for s in seen if s >= start(t) or s in chosen[t, shared]]
                for head in heads:
                    weights = (k[seen, shared] @ q[t, head] / q.shape[-1] ** 0.5).softmax(0)
                    out[t, head] = weights @ v[seen, shared]
        x = x + mixer.o(out.flatten(1))
        x = x + block.mlp(block.mlp_norm(x))
    return model.head(model.norm(x))


@pytest.mark.parametrize(("first", "again"), PLACES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_whole_models_compute_what_a_plain_loop_does(first: int, again: int, kv_heads: int) -> None:
    made, ids = sparse_model(first, again, kv_heads=kv_heads), random_tokens(30)
    expected = by_hand(made, ids, first, again)
    assert_close(made(torch.tensor([ids]))[0], expected)
    assert (
        made(torch.tensor([ids])) - plain_model(kv_heads=kv_heads)(torch.tensor([ids]))
    ).abs().max() > 0.01


@torch.no_grad()
def test_a_budget_of_everything_is_softmax() -> None:
    ids = torch.tensor([random_tokens(50), random_tokens(50, seed=1)])
    assert_close(sparse_model(budget=50)(ids), plain_model()(ids))
    assert [type(each.mixer) is Softmax for each in sparse_model(2, 3).layers[:3]] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("taps", [0, 3])
@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
def test_however_tokens_come_they_read_the_same(taps: int, kv: str) -> None:
    """One by one, in slices, as long chains of several pieces, in trees, beside another slot."""
    made, ids = sparse_model(taps=taps), random_tokens(330)
    texts = {"whole": [330], "slices": [7, 200, 90, 33], "single": [320, *[1] * 10]}
    found = {}
    for name, parts in texts.items():
        state, logits, at = made.new_state(2, kv), [], 0
        feed(made, state, random_tokens(50, seed=3), slot=1)
        for part in parts:
            logits.append(feed(made, state, ids[at : at + part]))
            at += part
        found[name] = torch.cat(logits)[-10:]
    for each in found.values():
        if kv == "float":
            assert_close(each[-1], full_logits(made, [ids])[0])
        assert_close(each, found["whole"], atol=1e-10 if kv == "float" else 0.05)


@pytest.mark.parametrize("seed", range(4))
def test_nodes_of_trees_read_along_their_paths(seed: int) -> None:
    made, rng = sparse_model(2, 3), random.Random(seed)
    prompts = [random_tokens(length, seed=length) for length in (5, 26, 31)]
    state = prefilled(made, *prompts)
    # deep enough that groups close in the tree
    trees = [random_tree(rng, 20, reach=2) for _ in prompts]
    logits = made.step(
        [StepInput(i, tree.tokens, tree.parents) for i, tree in enumerate(trees)], state
    ).logits
    expected = [tree_logits(made, *each) for each in zip(prompts, trees, strict=True)]
    assert_close(logits, torch.cat(expected))


def test_layers_read_the_budget_of_the_nearest_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Element for element, and not one position more."""
    seen: list[torch.Tensor] = []
    nodes = Exact.nodes

    def counted(self: Exact, q: Any, keys: Any, values: Any, mask: Any, bias: Any = None) -> Any:
        shape = 1, 2, 1, q.shape[3], keys.shape[2]
        seen.append(torch.ones(shape).bool() if mask is None else mask[:, :, :1].expand(shape))
        return nodes(self, q, keys, values, mask, bias)

    made, length = sparse_model(1, 3), 41
    state = prefilled(made, random_tokens(length))
    monkeypatch.setattr(Exact, "nodes", counted)
    made.step([StepInput(0, [1])], state)
    every, few = length + 1, BUDGET + length + 1 - start(length)
    assert [each.sum(-1).flatten().tolist() for each in seen] == [
        2 * [count] for count in (every, every, few, every, few)
    ]
    seen.clear()
    made = sparse_model(1, 1)
    made.step([StepInput(0, [1])], prefilled(made, random_tokens(length)))
    reading = seen[-3:]
    assert torch.equal(reading[0], reading[1]) and torch.equal(reading[0], reading[2])


@torch.no_grad()
def test_texts_of_a_batch_and_threads_do_not_hear_of_each_other() -> None:
    made = sparse_model()
    texts = [random_tokens(60, seed=seed) for seed in range(4)]
    alone = [made(torch.tensor([text]))[0] for text in texts]
    assert_close(made(torch.tensor(texts)), torch.stack(alone))
    found: dict[int, torch.Tensor] = {}

    def run(at: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[at] = made(torch.tensor([texts[at]]))[0]

    threads = [threading.Thread(target=run, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close([found[at] for at in range(4)], alone)
    with handing({"key": 1}):
        other: list[Any] = []
        thread = threading.Thread(target=lambda: other.append(_asked()))
        thread.start()
        thread.join()
        assert (other, handed("key", "tidal")) == ([None], 1)
    assert _asked() is None


def _asked() -> Any:
    try:
        return handed("key", "tidal")
    except StateError:
        return None


@pytest.mark.parametrize("drafter", ["lookup", "itself", "other"])
def test_speculation_changes_no_token(drafter: str) -> None:
    made = sparse_model().to_inference()
    prompts = [random_tokens(20) * 3, random_tokens(33, seed=1)]
    params = [SamplingParams(temperature=0, max_tokens=40)] * 2
    plain = outputs(decode(made, prompts, params))
    assert outputs(decode(made, prompts, params, DRAFTERS[drafter](made))) == plain


def test_who_reads_without_a_selection_is_told_so() -> None:
    made = sparse_model(1, 1)
    without = skipping(made, mixers={1}, mlps=set())
    text = random_tokens(40)
    for call in (lambda: full_logits(without, [text]), lambda: prefilled(without, text[:9])):
        with pytest.raises(StateError, match="'tidal' reads what an earlier layer selects"):
            call()
    reads = MixerConfig(name="tidal", group=GROUP, options={"selects": False})
    alone = Decoder(tiny_config(reads))
    with pytest.raises(StateError, match="selects=true"):
        alone(torch.tensor([text]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tidal:first=3,again=2", "first=3 and again=2 of 5"),
        ("tidal:again=5", "first=2 and again=5 of 5"),
        ("tidal:first=5", "first=5 and again=5 of 5"),
        ("tidal:budget=0", "budget"),
        ("tidal:first=-1", "first"),
    ],
)
def test_layers_that_the_model_has_not_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_sparse_attention(plain_model(), spec)


def test_models_of_divided_heads_are_refused() -> None:
    mixer = MixerConfig(name="by-head", group=GROUP, span=2, sinks=2, exact_heads=(0,))
    with pytest.raises(ConfigError, match="by-head.*choose 'pages'"):
        with_sparse_attention(tiny_model(*[mixer] * LAYERS), "tidal")


def test_the_middle_layer_selects_again_by_default() -> None:
    made = with_sparse_attention(tiny_model(*["softmax"] * 8), "tidal")
    selecting = [i for i, each in enumerate(made.config.mixers) if each.options.get("selects")]
    assert selecting == [2, 4]
    assert [each.name for each in made.config.mixers] == ["softmax"] * 2 + ["tidal"] * 6
