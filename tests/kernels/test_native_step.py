"""The one-call step against the step by layers, and trees against chains, bit for bit."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch

from linspec.decoding.step import StepInput, Want
from linspec.errors import InputError, StateError
from linspec.kernels.cpu.library import instruction_sets
from linspec.mixers import MIXERS as REGISTRY
from linspec.mixers.config import MixerConfig, RelativeConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer

MIXERS = {
    "softmax": MixerConfig(),
    "window": MixerConfig(name="window", window=9),
    "local": MixerConfig(name="local", group=8),
    "grouped": MixerConfig(name="grouped", group=8),
    "aug": MixerConfig(name="aug", group=8, taps=5),
    "aug-softmax": MixerConfig(name="aug", group=8, taps=5, span=3, kernel="softmax"),
    "streaming": MixerConfig(name="streaming", group=8, span=2, sinks=3),
    "streaming-taps": MixerConfig(name="streaming", group=4, sinks=4, taps=5),
    "by-head": MixerConfig(name="by-head", group=8, span=2, sinks=3, taps=5, exact_heads=(1,)),
    "h2o": MixerConfig(name="h2o", group=8, span=2, options={"budget": 20}),
    "snapkv": MixerConfig(name="snapkv", group=8, options={"budget": 70, "last": 3, "pool": 3}),
    "snapkv-taps": MixerConfig(name="snapkv", group=16, taps=5, options={"budget": 9, "last": 40}),
    "delta": MixerConfig(name="delta", group=8, options={"threshold": 0.3}),
    "delta-taps": MixerConfig(name="delta", group=5, span=3, taps=3, options={"threshold": 0.2}),
}
SUMMED = {
    "relu": MixerConfig(name="relu", group=8),
    "relu-softmax": MixerConfig(name="relu", group=8, span=2, kernel="softmax", taps=3),
    "hedgehog": MixerConfig(name="hedgehog", group=8, span=2),
    "transnormer": MixerConfig(name="transnormer", group=8, taps=5),
    "transnormer-relu2": MixerConfig(name="transnormer", group=8, kernel="relu2"),
    "global": MixerConfig(name="global", group=8, taps=3),
    "performer": MixerConfig(name="performer", group=8, features=37),
    "rfa": MixerConfig(name="rfa", group=8, features=37),
    "gla": MixerConfig(name="gla", group=8, taps=3),
    "gla-softmax": MixerConfig(name="gla", group=8, span=2, kernel="softmax"),
    "gdn-relu2": MixerConfig(name="gdn", group=8, kernel="relu2"),
    "gdn": MixerConfig(name="gdn", group=8, span=2),
    "yoso": MixerConfig(name="yoso", group=8, span=2, taps=3),
    "yoso-softmax": MixerConfig(name="yoso", group=8, kernel="softmax"),
    "linformer": MixerConfig(name="linformer", group=8, span=2, keep=3, features=3, taps=3),
    "linformer-few": MixerConfig(name="linformer", group=4, keep=2),
    "local-relu2": MixerConfig(name="local", group=8, span=2, kernel="relu2"),
    "grouped-relu2": MixerConfig(name="grouped", group=8, kernel="relu2"),
    "aug-relu2": MixerConfig(name="aug", group=8, span=2, kernel="relu2", taps=5),
}
MIXERS |= SUMMED
# whose nodes get the same bits however they come; linear mixers but where a group closes
EXACT = (
    *("softmax", "window", "streaming", "streaming-taps", "by-head"),
    *("h2o", "snapkv", "snapkv-taps", "delta", "delta-taps"),
)
TREE = [-1, 0, 0, 1, 3, 2, 4, 6, 7, 5]


def assert_most_near(one: torch.Tensor, other: torch.Tensor, atol: float) -> None:
    """Rows over 4-bit codes: one that rounds the other way shows, in the few nodes that weigh it."""
    errors = (one - other).abs().amax(-1)
    assert (errors <= atol).float().mean() >= 0.9
    assert errors.max() <= 0.5


def model(mixer: str, bits: int | None = None, **changes: Any) -> Decoder:
    config = DecoderConfig(
        vocab_size=97, width=64, layers=3, heads=4, kv_heads=2, head_width=24, mlp_width=88
    )
    changes = {"mixers": (MIXERS[mixer], MixerConfig(), MIXERS[mixer])} | changes
    config = replace(config, **changes)
    torch.manual_seed(0)
    made = Decoder(config)
    for name, parameter in made.named_parameters():
        if name.endswith(
            ("alpha", "taps", "gain", "gamma", "gate_map", "gate_bias", "gate_scale", "_map")
        ):
            torch.nn.init.normal_(parameter, 0.3, 0.2)
    return made.to_inference(Quantizer(bits, {})) if bits else made.to_inference()


@pytest.mark.crossed(18)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "qkv_bias": True}])
def test_one_call_computes_the_step(isa: str, mixer: str, changes: dict[str, Any]) -> None:
    made = model(mixer, **changes)
    assert made.native is not None
    native, ids = made.native, torch.arange(200) * 31 % 97
    states = []
    for form in (native, None):
        made.native = form
        state = made.new_state(2)
        outputs = []
        for slot, length in ((0, 70), (1, 5)):
            made.step([StepInput(slot, ids[:length].tolist(), all_logits=False)], state)
            state.commit(slot, range(length))
        # one slot stages twice, both are verified together
        made.step([StepInput(0, ids[70:73].tolist())], state)
        for _ in range(3):
            new = [
                StepInput(0, [7, 8], [1, 3])
                if len(state.staged(0)) == 3
                else StepInput(0, [7, 8], [-1, 0])
            ]
            new.append(StepInput(1, ids[: len(TREE)].tolist(), TREE))
            output = made.step(new, state)
            outputs += [output.hidden, output.logits]
            state.commit(0, [0, 1])
            state.commit(1, [0, 1, 3, 4, 6])
        states.append(outputs)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", ["softmax", "aug", "by-head"])
def test_states_of_layers_and_given_embeddings_go_through_the_call(isa: str, mixer: str) -> None:
    """A prompt beside a tree, both with embeddings that stand for no token."""
    made = model(mixer, embedding_scale=1.5)
    assert made.native is not None
    native, found = made.native, []
    given = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    for form in (native, None):
        made.native = form
        state, want = made.new_state(2), Want((2, 0))
        made.step([StepInput(0, [0] * 70, embeddings=given)], state)
        state.commit(0, range(70))
        inputs = [
            StepInput(0, list(range(10)), TREE, embeddings=given[:10].bfloat16()),
            StepInput(1, [index * 31 % 97 for index in range(80)], all_logits=False),
        ]
        found.append((made.step(inputs, state, want=want), made.step(inputs[:1], state, want=want)))
    for one, other in zip(*found, strict=True):
        assert (one.slices, one.nodes) == (other.slices, other.nodes) and one.nodes
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
        for layer in (0, 2):
            torch.testing.assert_close(one.layers[layer], other.layers[layer], rtol=1e-4, atol=1e-4)


def test_embeddings_of_another_width_are_refused_before_they_are_read() -> None:
    made = model("softmax")
    with pytest.raises(InputError, match=r"embeddings \[2, 63\] for 2 tokens"):
        made.step([StepInput(0, [0, 0], embeddings=torch.zeros(2, 63))], made.new_state())


DISTANT = {
    "positions": "relative",
    "relative": RelativeConfig(buckets=8, max_distance=20),
}


@pytest.mark.crossed(3)
@pytest.mark.parametrize(
    "mixer",
    [
        "softmax",
        "window",
        "local",
        "grouped",
        "aug",
        "aug-softmax",
        "aug-relu2",
        "local-relu2",
        "relu",
    ],
)
def test_a_bias_by_distance_in_one_call(isa: str, mixer: str) -> None:
    test_one_call_computes_the_step(isa, mixer, {**DISTANT, "score_cap": 3.0})


@pytest.mark.parametrize("kv", ["float", "bfloat16", "int8", "int4"])
def test_a_tree_gets_the_bits_of_plain_decoding_with_a_bias_by_distance(isa: str, kv: str) -> None:
    made = model("window", 8, **DISTANT)
    tree, apart = made.new_state(1, kv), made.new_state(1, kv)
    ids = [index * 31 % 97 for index in range(150)]
    whole = made.step([StepInput(0, ids)], tree).logits
    tree.commit(0, range(150))
    for place, token in enumerate(ids):
        alone = made.step([StepInput(0, [token])], apart).logits
        apart.commit(0, [0])
        assert torch.equal(alone[0], whole[place])
    together = made.step([StepInput(0, list(range(10)), TREE)], tree).logits
    for node in (0, 1, 3, 4, 6, 7, 8):
        alone = made.step([StepInput(0, [node])], apart).logits
        apart.commit(0, [0])
        assert torch.equal(alone[0], together[node])


def test_every_registered_mixer_has_a_plan(library: ctypes.CDLL) -> None:
    known = {each.name for each in MIXERS.values()}
    own = {name for name in REGISTRY.names() if not name.startswith(("test", "study-", "guest"))}
    # in test_selected_step.py, test_listed_step.py and test_shadow_step.py
    assert own - {"pages", "tidal", "shadow"} <= known


@pytest.mark.crossed(6)
@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
@pytest.mark.parametrize("exact", [(), (2,), (0, 3), (0, 1, 2, 3)], ids=str)
def test_heads_of_one_layer_that_read_in_different_ways(
    isa: str, exact: tuple[int, ...], kv: str
) -> None:
    """A prompt, a tree behind its snapshot in another slot, and a batch: in one call and by layers."""
    mixed = replace(MIXERS["by-head"], exact_heads=exact)
    made = model("by-head", heads=8, kv_heads=4, mixers=(mixed, MIXERS["by-head"], mixed))
    assert made.native is not None
    native, results = made.native, []
    for form in (native, None):
        made.native = form
        state = made.new_state(3, kv)
        prompt = [index * 31 % 97 for index in range(150)]
        outputs = [made.step([StepInput(1, prompt)], state).logits]
        state.commit(1, range(len(prompt)))
        state.restore(2, state.snapshot(1))
        new = [StepInput(0, prompt[:20]), *(StepInput(at, list(range(10)), TREE) for at in (1, 2))]
        outputs.append(made.step(new, state).logits)
        results.append(outputs)
    assert torch.equal(results[0][1][20:30], results[0][1][30:])
    # of codes: a score may round the other way
    close = {"rtol": 1e-4, "atol": 1e-4} if kv == "float" else {"rtol": 0.0, "atol": 2e-2}
    for one, other in zip(*results, strict=True):
        if kv == "int4":
            assert_most_near(one, other, 2e-2)
        else:
            torch.testing.assert_close(one, other, **close)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("mixer", EXACT)
def test_a_tree_is_verified_bit_for_bit(isa: str, mixer: str, bits: int | None) -> None:
    """Speculation is lossless to the bit: a path of a tree scores as the same tokens one by one."""
    made = model(mixer, bits)
    tokens = [3 * node + 1 for node in range(len(TREE))]
    prompt = [5, 6, 7, 8, 9, 10, 11] * 11
    tree = made.new_state(2)
    made.step([StepInput(0, prompt)], tree)
    tree.commit(0, range(len(prompt)))
    tree.fork(0, 1)
    together = made.step([StepInput(0, tokens, TREE), StepInput(1, [1])], tree).logits
    for path in ([0, 1, 3, 4, 6, 7, 8], [0, 2, 5, 9]):
        chain = made.new_state()
        chain.restore(0, tree.snapshot(0))
        for node in path:
            logits = made.step([StepInput(0, [tokens[node]])], chain).logits
            chain.commit(0, [0])
            assert torch.equal(logits[0], together[node])


@pytest.mark.crossed(3)
@pytest.mark.parametrize("mixer", SUMMED)
def test_nodes_of_sums_get_the_bits_of_tokens_one_by_one_where_no_group_closes(
    isa: str, mixer: str
) -> None:
    """However they come: in a prompt, in a tree, staged in two steps, alone."""
    layer = replace(SUMMED[mixer], group=256)
    made = model("softmax", 8, mixers=(layer, MixerConfig(), layer))
    ids = [index * 31 % 97 for index in range(80)]
    whole, apart = made.new_state(), made.new_state()
    logits = [*made.step([StepInput(0, ids)], whole).logits]
    whole.commit(0, range(len(ids)))
    first = made.step([StepInput(0, [0, 1, 2], [-1, 0, 0])], whole).logits
    later = made.step([StepInput(0, [3, 4, 5], [2, 3, 1])], whole).logits
    logits += [first[0], first[2], later[0], later[1]]
    for token, expected in zip([*ids, 0, 2, 3, 4], logits, strict=True):
        alone = made.step([StepInput(0, [token])], apart).logits
        apart.commit(0, [0])
        assert torch.equal(alone[0], expected)


@pytest.mark.crossed(9)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_has_the_same_bits_on_every_instruction_set(
    library: ctypes.CDLL, mixer: str, bits: int | None
) -> None:
    same_bits_on_every_set(library, model(mixer, bits))


@pytest.mark.parametrize("mixer", ["softmax", "grouped", "aug-relu2"])
def test_a_bias_by_distance_has_the_same_bits_on_every_instruction_set(
    library: ctypes.CDLL, mixer: str
) -> None:
    same_bits_on_every_set(library, model(mixer, 8, **DISTANT))


def same_bits_on_every_set(library: ctypes.CDLL, made: Decoder) -> None:
    """Norms, quantization, rotation, attention over a cache and over sums, and all linear layers."""
    before = library.ls_isa()
    prompt, results = [index * 31 % 97 for index in range(63)], []
    filled = made.new_state()
    made.step([StepInput(0, prompt)], filled)
    filled.commit(0, range(len(prompt)))
    for name in instruction_sets(library):
        assert library.ls_use_isa(name.encode())
        state = made.new_state()
        state.restore(0, filled.snapshot(0))
        output = made.step([StepInput(0, list(range(len(TREE))), TREE)], state)
        results.append((output.hidden, output.logits))
    assert library.ls_use_isa(before)
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.crossed(9)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("lengths", [(65,), (150, 70), (9, 128, 200)])
def test_a_prompt_in_one_call_is_the_prompt_by_layers(
    library: ctypes.CDLL, mixer: str, lengths: tuple[int, ...]
) -> None:
    """Its logits, and what the state holds afterwards; groups close on the way."""
    made = model(mixer)
    native, results = made.native, []
    for form in (native, None):
        made.native = form
        state, outputs, done = made.new_state(2), [], 0
        for length in lengths:
            ids = [(done + i) * 31 % 97 for i in range(length)]
            output = made.step([StepInput(1, ids)], state)
            state.commit(1, range(length))
            outputs += [output.hidden, output.logits]
            done += length
        tree = made.step([StepInput(1, list(range(len(TREE))), TREE)], state)
        kept = [
            tensor for part in state.snapshot(1) for tensor in (part.keys, part.values, part.sums)
        ]
        results.append([*outputs, tree.logits, *(tensor for tensor in kept if tensor is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.crossed(12)
@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("mixer", EXACT)
def test_a_prompt_gets_the_bits_of_its_tokens_one_by_one(
    isa: str, mixer: str, bits: int | None, kv: str
) -> None:
    made = model(mixer, bits)
    ids = [index * 31 % 97 for index in range(150)]
    together, apart = made.new_state(1, kv), made.new_state(1, kv)
    whole = made.step([StepInput(0, ids)], together).logits
    together.commit(0, range(len(ids)))
    for place, token in enumerate(ids):
        alone = made.step([StepInput(0, [token])], apart).logits
        apart.commit(0, [0])
        assert torch.equal(alone[0], whole[place])
    after = [
        made.step([StepInput(0, [5, 6], [-1, 0])], state).logits for state in (together, apart)
    ]
    assert torch.equal(*after)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_prompt_has_the_same_bits_on_every_instruction_set(
    library: ctypes.CDLL, mixer: str
) -> None:
    made, before, results = model(mixer, 8), library.ls_isa(), []
    for name in instruction_sets(library):
        assert library.ls_use_isa(name.encode())
        output = made.step(
            [StepInput(0, [index * 31 % 97 for index in range(140)])], made.new_state()
        )
        results.append(output.logits)
    assert library.ls_use_isa(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_longer_prompt_beside_a_prompt_changes_nothing(
    library: ctypes.CDLL, mixer: str, kv: str
) -> None:
    """The buffers grow for the second one when the first is staged and nothing of it recorded."""
    made = model(mixer)
    short, long = [3] * 70 + list(range(20)), list(range(97)) * 4
    state, alone = made.new_state(2, kv), made.new_state(2, kv)
    made.step([StepInput(0, short), StepInput(1, long)], state)
    made.step([StepInput(0, short)], alone)
    for each in (state, alone):
        each.commit(0, range(len(short)))
    after = [made.step([StepInput(0, [7])], each).logits for each in (state, alone)]
    assert torch.equal(*after)


@pytest.mark.parametrize("mixer", ["softmax", "aug"])
def test_a_dropped_prompt_leaves_nothing(library: ctypes.CDLL, mixer: str) -> None:
    made = model(mixer)
    state, first = made.new_state(2), list(range(80))
    made.step([StepInput(0, first)], state)
    state.commit(0, range(80))
    before = made.step([StepInput(0, [7])], state).logits
    state.drop(0)
    made.step([StepInput(0, [11] * 90)], state)
    state.drop(0)
    assert torch.equal(made.step([StepInput(0, [7])], state).logits, before)


def test_nothing_is_staged_behind_a_prompt(library: ctypes.CDLL) -> None:
    made = model("softmax")
    state = made.new_state()
    made.step([StepInput(0, list(range(70)))], state)
    with pytest.raises(StateError, match="staged a chain of 70 tokens"):
        made.step([StepInput(0, [1], [69])], state)


def test_prompts_beside_trees_change_nothing(library: ctypes.CDLL) -> None:
    made = model("softmax", 8)
    state = made.new_state(3)
    alone = made.step([StepInput(1, [5, 6, 7])], state)
    state.drop(1)
    long = list(range(90))
    both = made.step(
        [StepInput(0, long), StepInput(1, [5, 6, 7]), StepInput(2, [1], all_logits=False)], state
    )
    assert torch.equal(both.logits[both.slices[1]], alone.logits)
    assert [part.stop - part.start for part in both.slices] == [90, 3, 1]
    assert both.logits.shape == (94, 97)


def test_a_new_state_in_the_place_of_an_old_one(library: ctypes.CDLL) -> None:
    """Sums were read from where those of a freed state had been, as keys and values had not moved."""
    made = model("aug")
    prompt = [index * 7 % 97 for index in range(30)]
    kept = []
    for _ in range(12):
        state = made.new_state(1 + len(kept) % 2)
        made.step([StepInput(0, prompt)], state)
        state.commit(0, range(len(prompt)))
        logits = made.step([StepInput(0, [1])], state).logits
        # keeps some buffers alive, so that the next state is spread over old holes
        kept.append((logits, state.parts[0].sums if len(kept) % 3 else None))
        del state
    assert all(torch.equal(logits, kept[0][0]) for logits, _ in kept)
