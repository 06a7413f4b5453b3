"""The step form equals the full form: for every mixer, every tree, every split into steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from helpers import (
    CASES,
    DEVICES,
    GROUP,
    MIXER_NAMES,
    assert_close,
    assert_same_bytes,
    feed,
    full_logits,
    mixer_config,
    path_tokens,
    prefilled,
    random_tokens,
    random_tree,
    remembered,
    tiny_model,
    tree_logits,
    trees,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.step import MAX_STAGED, StepInput
from linspec.decoding.tree import TokenTree, chain, from_paths
from linspec.errors import ConfigError, ContextOverflow, StateError
from linspec.models.decoder import Decoder
from linspec.state.sequence_states import SequenceStates

HYBRID = ("softmax", "aug", "window", "relu", "local", "global")
# from every offset the longest branch, 2 * GROUP + 2 deep, crosses two borders or more
BRANCHES = from_paths(
    1, [(2, 3), (2, 4, 5, 6, 7), (8, *range(2 * GROUP + 1)), (8, 0, 5), (9,), (8, 0, 1, 9, 9)]
)
MODELS = [pytest.param((mixer_config(name, taps),), id=f"{name}-{taps}") for name, taps in CASES]
MODELS.append(pytest.param(HYBRID, id="hybrid"))
Layers = tuple[object, ...]


def step_tree(model: Decoder, prompt: Sequence[int], tree: TokenTree) -> torch.Tensor:
    return model.step([StepInput.tree(0, tree)], prefilled(model, prompt)).logits


# ---- step = full = tree


@pytest.mark.crossed(5)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", MODELS)
def test_tree_equals_full_at_every_offset_and_across_borders(layers: Layers, device: str) -> None:
    model = tiny_model(*layers, device=device)
    for length in range(2 * GROUP + 1):
        prompt = random_tokens(length)
        assert_close(step_tree(model, prompt, BRANCHES), tree_logits(model, prompt, BRANCHES))


@pytest.mark.crossed(6)
@pytest.mark.parametrize("layers", MODELS)
@settings(max_examples=10)
@given(length=st.integers(0, 3 * GROUP), tree=trees())
def test_random_trees_equal_full(layers: Layers, length: int, tree: TokenTree) -> None:
    model, prompt = tiny_model(*layers), random_tokens(length)
    assert_close(step_tree(model, prompt, tree), tree_logits(model, prompt, tree))


@pytest.mark.slow
@pytest.mark.parametrize("layers", MODELS)
@settings(max_examples=settings().max_examples * 5)
@given(length=st.integers(0, 100), tree=trees(MAX_STAGED))
def test_large_random_trees_equal_full(layers: Layers, length: int, tree: TokenTree) -> None:
    model, prompt = tiny_model(*layers), random_tokens(length)
    assert_close(step_tree(model, prompt, tree), tree_logits(model, prompt, tree))


@pytest.mark.crossed(6)
@pytest.mark.parametrize("layers", MODELS)
@pytest.mark.parametrize("length", [0, GROUP + 1])
def test_the_deepest_chain_and_the_widest_tree(layers: Layers, length: int) -> None:
    model, prompt = tiny_model(*layers), random_tokens(length)
    deep = chain(random_tokens(MAX_STAGED, seed=1))
    wide = TokenTree(deep.tokens, (-1, *[0] * (MAX_STAGED - 1)))
    for tree in (deep, wide):
        assert_close(step_tree(model, prompt, tree), tree_logits(model, prompt, tree))


@pytest.mark.crossed(5)
@pytest.mark.parametrize(
    "switches",
    [{"kv_heads": 4}, {"kv_heads": 1}, {"qk_norm": True}, {"positions": "learned"}],
    ids=str,
)
@pytest.mark.parametrize("name", MIXER_NAMES)
def test_head_layouts_and_positions(name: str, switches: dict[str, object]) -> None:
    model = tiny_model(name, **switches)
    for length in (0, 1, GROUP + 2):
        prompt = random_tokens(length)
        assert_close(step_tree(model, prompt, BRANCHES), tree_logits(model, prompt, BRANCHES))


@pytest.mark.parametrize("layers", MODELS)
def test_token_by_token_equals_full(layers: Layers) -> None:
    model, tokens = tiny_model(*layers), random_tokens(4 * GROUP + 1)
    state = model.new_state()
    logits = torch.cat([feed(model, state, [token]) for token in tokens])
    with torch.no_grad():
        assert_close(logits, model(torch.tensor([tokens]))[0])


def test_only_the_last_logits_on_request() -> None:
    model, state = tiny_model("aug"), tiny_model("aug").new_state(2)
    inputs = [StepInput(0, [1, 2, 3], all_logits=False), StepInput(1, [4, 5])]
    out = model.step(inputs, state)
    assert out.slices == [slice(0, 1), slice(1, 3)]
    assert_close(out.logits, full_logits(model, [[1, 2, 3], [4], [4, 5]]))
    with torch.no_grad():
        assert_close(model.head(out.hidden), out.logits)


def test_logits_of_some_tokens_on_request() -> None:
    model = tiny_model("aug")
    given = [(0, [1, 2, 3, 4]), (1, [5, 6])]
    all_of_them = model.step([StepInput(*each) for each in given], model.new_state(2))
    inputs = [StepInput(0, given[0][1], logits_of=(1, 3)), StepInput(1, given[1][1])]
    out = model.step(inputs, model.new_state(2))
    assert out.slices == [slice(0, 2), slice(2, 4)]
    assert_close(out.logits, all_of_them.logits[[1, 3, 4, 5]])


# ---- prefill


@pytest.mark.crossed(3)
@pytest.mark.parametrize("layers", MODELS)
def test_prefill_split_anywhere_equals_one_prefill(layers: Layers) -> None:
    model, tokens = tiny_model(*layers), random_tokens(2 * GROUP + 3)
    expected = prefilled(model, tokens)
    for cut in range(1, len(tokens)):
        state = prefilled(model, tokens[:cut])
        feed(model, state, tokens[cut:])
        assert_close(remembered(model, state), remembered(model, expected))


@pytest.mark.crossed(6)
@pytest.mark.parametrize("layers", MODELS)
@pytest.mark.parametrize("cuts", [(64,), (65,), (1, 70), (70, 140), (GROUP, 80, 81)], ids=str)
def test_long_prefill_in_chunks_equals_the_full_form(layers: Layers, cuts: tuple[int, ...]) -> None:
    model, tokens = tiny_model(*layers), random_tokens(150)
    state, ends = model.new_state(), (*cuts, len(tokens))
    chunks = [tokens[a:b] for a, b in zip((0, *cuts), ends, strict=True)]
    logits = torch.cat([feed(model, state, chunk) for chunk in chunks])
    with torch.no_grad():
        assert_close(logits, model(torch.tensor([tokens]))[0])
    assert_close(remembered(model, state), remembered(model, prefilled(model, tokens)))


@pytest.mark.crossed(3)
@pytest.mark.parametrize("layers", MODELS)
def test_part_of_a_long_chain_can_be_committed(layers: Layers) -> None:
    model, tokens = tiny_model(*layers), random_tokens(MAX_STAGED + 9)
    for prompt in (0, GROUP + 1):
        for kept in (0, 1, GROUP, MAX_STAGED + 3 - prompt):
            state = prefilled(model, tokens[:prompt])
            model.step([StepInput(0, (tokens * 2)[prompt : prompt + MAX_STAGED + 5])], state)
            state.commit(0, range(kept))
            expected = prefilled(model, (tokens * 2)[: prompt + kept])
            assert_close(remembered(model, state), remembered(model, expected))


# ---- histories


def stage_randomly(
    model: Decoder, state: SequenceStates, text: list[int], rng: random.Random
) -> list[int]:
    """Stage a random forest in one to three steps, checking logits; the staged tokens."""
    tokens: list[int] = []
    for _ in range(rng.randint(1, 3)):
        count = rng.randint(1, 5)
        parents = [
            rng.randint(max(-1, len(tokens) + i - 4), len(tokens) + i - 1) for i in range(count)
        ]
        new = random_tokens(count, seed=rng.randrange(2**20))
        logits = model.step([StepInput(0, new, parents)], state).logits
        tokens += new
        seen = state.staged(0).ancestors
        paths = [[*text, *(tokens[n] for n in row.nonzero().flatten().tolist())] for row in seen]
        assert_close(logits, full_logits(model, paths[-count:]))
    return tokens


def round_randomly(
    model: Decoder, state: SequenceStates, text: list[int], rng: random.Random
) -> list[int]:
    """One round of staging, then a commit of a random path, or of nothing; the accepted tokens."""
    if rng.random() < 0.1:
        tokens = random_tokens(rng.randint(MAX_STAGED, MAX_STAGED + 8), seed=rng.randrange(2**20))
        model.step([StepInput(0, tokens)], state)
    else:
        tokens = stage_randomly(model, state, text, rng)
    if rng.random() < 0.2:
        state.drop(0)
        return []
    row = state.staged(0).ancestors[rng.randrange(len(tokens))]
    path = row.nonzero().flatten().tolist()
    path = path[: rng.randint(0, len(path))] if rng.random() < 0.3 else path
    state.commit(0, path)
    return [tokens[node] for node in path]


def check_history(model: Decoder, prompt: int, rounds: int, seed: int) -> None:
    rng, text = random.Random(seed), random_tokens(prompt)
    state = prefilled(model, text)
    for _ in range(rounds):
        text += round_randomly(model, state, text, rng)
        assert state.length(0) == len(text)
    fresh = prefilled(model, text)
    assert_close(remembered(model, state), remembered(model, fresh))
    tree = random_tree(rng, 6)
    undone, expected = (model.step([StepInput.tree(0, tree)], s).logits for s in (state, fresh))
    assert_close(undone, expected)
    assert_close(undone, tree_logits(model, text, tree))


@pytest.mark.crossed(10)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", MODELS)
@settings(max_examples=10)
@given(prompt=st.integers(0, 2 * GROUP), rounds=st.integers(1, 6), seed=st.integers(0, 2**20))
def test_a_history_of_rounds_equals_one_prefill_of_the_accepted_text(
    layers: Layers, device: str, prompt: int, rounds: int, seed: int
) -> None:
    check_history(tiny_model(*layers, device=device), prompt, rounds, seed)


@pytest.mark.slow
@pytest.mark.parametrize("layers", MODELS)
@settings(max_examples=settings().max_examples * 2)
@given(prompt=st.integers(0, 100), rounds=st.integers(10, 40), seed=st.integers(0, 2**20))
def test_long_histories(layers: Layers, prompt: int, rounds: int, seed: int) -> None:
    check_history(tiny_model(*layers), prompt, rounds, seed)


# ---- ragged batches


@pytest.mark.crossed(4)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", MODELS)
def test_ragged_batches_equal_single_rows(layers: Layers, device: str) -> None:
    """Long prefills, trees of different sizes and plain steps ride together; slot 5 sits out."""
    model, rng = tiny_model(*layers, device=device), random.Random(3)
    prompts = [random_tokens(n, seed=n) for n in (3, 2, 0, 11, GROUP, 5, 70, GROUP + 1)]
    batch = {0: 7, 1: 1, 2: 70, 3: 66, 4: 3, 6: 2, 7: 12}
    drafts = {
        slot: chain(random_tokens(n, seed=n)) if n > MAX_STAGED else random_tree(rng, n, reach=3)
        for slot, n in batch.items()
    }
    state = prefilled(model, *prompts)
    out = model.step([StepInput.tree(slot, tree) for slot, tree in drafts.items()], state)
    for (slot, tree), rows in zip(drafts.items(), out.slices, strict=True):
        assert_close(out.logits[rows], step_tree(model, prompts[slot], tree))
        node = len(tree) // 2
        state.commit(slot, tree.path_to(node))
        alone = prefilled(model, [*prompts[slot], *path_tokens(tree, node)])
        assert_close(remembered(model, state, slot), remembered(model, alone))
    assert_close(remembered(model, state, 5), remembered(model, prefilled(model, prompts[5])))


@pytest.mark.parametrize("layers", MODELS)
def test_rows_that_have_staged_different_numbers_of_nodes(layers: Layers) -> None:
    model, prompts = tiny_model(*layers), [[1, 2, 3], [4], [5, 6]]
    state = prefilled(model, *prompts)
    model.step([StepInput(0, [7, 8, 9], [-1, 0, 0]), StepInput(1, [7])], state)
    out = model.step(
        [StepInput(0, [1], [2]), StepInput(1, [2, 3], [0, 1]), StepInput(2, [4, 5], [-1, -1])],
        state,
    )
    texts = [[1, 2, 3, 7, 9, 1], [4, 7, 2], [4, 7, 2, 3], [5, 6, 4], [5, 6, 5]]
    assert_close(out.logits, full_logits(model, texts))


def test_slots_may_come_in_any_order() -> None:
    model, prompts = tiny_model(*HYBRID), [[1, 2, 3], [4], [5, 6]]
    out = model.step([StepInput(2, [7, 8]), StepInput(0, [9])], prefilled(model, *prompts))
    assert_close(out.logits, full_logits(model, [[5, 6, 7], [5, 6, 7, 8], [1, 2, 3, 9]]))


# ---- bad calls: a named error, and nothing has changed


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([StepInput(0, [])], ConfigError, "slot 0 was fed no tokens"),
        ([StepInput(0, [1, 2], [-1, 1])], ConfigError, "slot 0: node 1 has parent 1"),
        ([StepInput(0, [1, 2], [-1, 7])], ConfigError, "slot 0: node 1 has parent 7"),
        ([StepInput(0, [1, 2], [-1, -2])], ConfigError, "slot 0: node 1 has parent -2"),
        ([StepInput(0, [1, 2], [-1])], ConfigError, "2 tokens and 1 parents"),
        ([StepInput(0, [1] * 65, [-1] + [0] * 64)], ConfigError, "a tree of 65 nodes is too large"),
        (
            [StepInput(0, [1]), StepInput(0, [2])],
            ConfigError,
            r"slots \[1, 0, 0\] are not different",
        ),
        ([], ConfigError, "one input or more, got none"),
        ([StepInput(2, [1])], ConfigError, r"slots \[2\] are not different slots of a state of 2"),
        ([StepInput(-1, [1])], ConfigError, r"slots \[-1\] are not"),
    ],
)
def test_malformed_feeds_are_refused_before_any_change(
    inputs: list[StepInput], error: type[Exception], message: str
) -> None:
    model = tiny_model("aug")
    state = prefilled(model, [1, 2, 3], [4])
    before = state.snapshot(0)
    with pytest.raises(error, match=message):
        model.step(
            [StepInput(1, [9]), *inputs] if inputs and inputs[0].slot == 0 else inputs, state
        )
    assert_same_bytes(state.snapshot(0), before)
    assert not state.staged(0) and not state.staged(1)


def test_staged_nodes_must_be_committed_or_named_as_parents() -> None:
    model = tiny_model("aug")
    state = prefilled(model, [1, 2, 3])
    model.step([StepInput(0, [4, 5])], state)
    with pytest.raises(ConfigError, match="slot 0 has staged nodes: name the parents"):
        model.step([StepInput(0, [6])], state)
    with pytest.raises(ConfigError, match="a tree of 72 nodes is too large"):
        model.step([StepInput(0, [1] * 70, range(-1, 69))], state)
    assert state.staged(0).parents == (-1, 0)


def test_more_nodes_than_the_stage_holds_are_refused_in_pieces_too() -> None:
    """Only the nodes of one step were once counted; ancestors beyond the 64th were lost in the kernels."""
    model = tiny_model("aug")
    state = prefilled(model, [1, 2, 3])
    model.step([StepInput(0, [1] * 40)], state)
    with pytest.raises(ConfigError, match="a tree of 65 nodes is too large: 64 nodes"):
        model.step([StepInput(0, [1] * 25, range(39, 64))], state)
    assert len(state.staged(0)) == 40
    model.step([StepInput(0, [1] * 24, range(39, 63))], state)
    assert len(state.staged(0)) == MAX_STAGED


def test_nothing_can_be_staged_behind_a_long_chain() -> None:
    """It once could, and read rows that were never written."""
    model = tiny_model("aug")
    state = prefilled(model, [1, 2, 3])
    model.step([StepInput(0, [1] * 70)], state)
    with pytest.raises(StateError, match="has staged a chain of 70 tokens; commit it"):
        model.step([StepInput(0, [6], [69])], state)


@pytest.mark.parametrize("path", [[1], [0, 2], [0, 0], [0, 1, 4], [-1], [0, 3, 1]], ids=str)
def test_what_is_not_a_path_cannot_be_committed(path: list[int]) -> None:
    model = tiny_model(*HYBRID)
    state = prefilled(model, [1, 2, 3])
    before = state.snapshot(0)
    model.step([StepInput(0, [5, 6, 7, 8], [-1, 0, 1, 0])], state)
    with pytest.raises(StateError, match="is not a path from the root of the 4 staged nodes"):
        state.commit(0, path)
    assert_same_bytes(state.snapshot(0), before)
    state.commit(0, [0, 1, 2])
    assert_close(remembered(model, state), remembered(model, prefilled(model, [1, 2, 3, 5, 6, 7])))


@pytest.mark.parametrize("layers", [("aug", "softmax"), ("softmax",)], ids=str)
@pytest.mark.parametrize("count", [1, 3, MAX_STAGED + 6])
def test_a_softmax_model_refuses_positions_beyond_its_limit(
    layers: tuple[str, ...], count: int
) -> None:
    limit = 8 + count - 1
    model = tiny_model(*layers, max_positions=limit)
    state = prefilled(model, random_tokens(8), [1])
    before = state.snapshot(0), state.snapshot(1)
    with pytest.raises(
        ContextOverflow, match=f"position {limit} is beyond this model's {limit} pos"
    ):
        model.step([StepInput(1, [2]), StepInput(0, random_tokens(count))], state)
    for slot in (0, 1):
        assert_same_bytes(state.snapshot(slot), before[slot])
        assert not state.staged(slot)
    # the depth counts, not the number of nodes
    wide = StepInput(0, [1] * 9, [-1] * 9)
    if count > 1:
        assert model.step([wide], state).logits.isfinite().all()


def test_a_linear_model_goes_on_beyond_its_trained_positions() -> None:
    model, tokens = tiny_model("aug", "window", max_positions=8), random_tokens(100)
    state = prefilled(model, tokens[:70])
    logits = feed(model, state, tokens[70:])
    with torch.no_grad():
        assert_close(logits, model(torch.tensor([tokens]))[0, 70:])
