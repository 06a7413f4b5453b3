"""EAGLE-style drafts: the cache holds what a fresh prefill would, and outputs stay those of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import VOCAB, full_logits, random_tokens, randomise, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import GREEDY, PROMPTS, decode, outputs

from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.base import Drafter, DrafterContext
from linspec.drafters.confident import ConfidentTree
from linspec.drafters.eagle import Eagle, EagleOptions
from linspec.drafters.eagle_net import BOTH, EagleConfig, EagleNet, layers_to_read
from linspec.drafters.saved import save_drafter
from linspec.drafters.saved_packed import EAGLE
from linspec.errors import DrafterError
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer
from linspec.policies.base import Policy

DRAFTED = 20
RATES = [[0.5, 0.2, 0.1], [0.4, 0.1], [0.3]]


def random_net(model: Decoder, seed: int = 3, **changes: Any) -> EagleNet:
    """A drafter that computes something, of some of the tokens."""
    shape = EagleConfig(
        width=model.config.width,
        vocab_size=model.config.vocab_size,
        reads=layers_to_read(model.config.layers),
        vocabulary=DRAFTED,
        heads=4,
        kv_heads=2,
        head_width=4,
        mlp_width=24,
    )
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:DRAFTED]
    net = EagleNet(replace(shape, **changes), model, RATES, ids.sort().values.int())
    return randomise(net, seed).to(model.embed.weight.dtype)


def random_eagle(model: Decoder, history: int = 64, **changes: Any) -> Eagle:
    return Eagle(random_net(model, **changes), slots=4, options=EagleOptions(history=history))


class Lucky(Eagle):
    """Some of its drafts are replaced by what the target will choose."""

    name = "test-lucky"

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        trees = super().propose(sequences, budgets)
        return [self._lucky(*each) for each in zip(sequences, trees, strict=True)]

    def _lucky(self, sequence: RunningSequence, tree: TokenTree) -> TokenTree:
        tokens = list(tree.tokens)
        for node in range(1, len(tree)):
            if (node + len(sequence.tokens)) % 3:
                path = [tokens[at] for at in tree.path_to(tree.parents[node])]
                text = [*sequence.tokens[:-1], *path]
                tokens[node] = int(full_logits(self.net.target, [text])[0].argmax())
        return TokenTree(tuple(tokens), tree.parents, confidences=tree.confidences)


# ---- the tree


def test_a_confident_tree_has_the_likeliest_paths() -> None:
    """Against all paths of a little language, for every budget."""
    rows = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1)

    def children(token: int) -> tuple[list[int], list[float]]:
        best = rows[token].topk(6)
        return best.indices.tolist(), best.values.tolist()

    paths = {(): 0.0}
    for _ in range(3):
        longer = {p: v for p, v in paths.items() if len(p) == max(map(len, paths))}
        for path, value in longer.items():
            for token, share in zip(*children(path[-1] if path else 0), strict=True):
                paths[(*path, token)] = value + share
    del paths[()]
    for nodes in (1, 2, 5, 17):
        grown = ConfidentTree(0, Budget(nodes, 3), top=6**3)
        grown.add(-1, *children(0))
        while level := grown.next_level():
            for node in level:
                grown.add(node, *children(grown.tokens[node]))
        tree = grown.tree()
        found = [tuple(tree.tokens[n] for n in tree.path_to(at)[1:]) for at in range(1, len(tree))]
        assert found == sorted(paths, key=lambda path: -paths[path])[:nodes]
        assert tree.confidences is not None and tree.confidences[0] == 1.0
        for at, path in enumerate(found, 1):
            value = sum(
                map(float, torch.tensor([tree.confidences[n] for n in tree.path_to(at)]).log())
            )
            assert value == pytest.approx(paths[path], abs=1e-4)


def test_small_trees_ask_for_few_levels() -> None:
    grown = ConfidentTree(0, Budget(2, 9), top=4)
    grown.add(-1, [1, 2, 3, 4], [-0.1, -1.0, -2.0, -3.0])
    # no child of the others can be among the two likeliest nodes
    assert grown.next_level() == [0]
    grown.add(0, [5, 6], [-2.0, -2.5])
    assert grown.next_level() == []
    assert grown.tree().tokens == (0, 1, 2)


# ---- the cache


class Sequences:
    """A sequence whose target states are known, and a drafter that follows it."""

    def __init__(self, model: Decoder, drafter: Eagle, slot: int, prompt: Sequence[int]) -> None:
        self.model, self.drafter = model, drafter
        self.now: Any = SimpleNamespace(slot=slot, tokens=list(prompt), hidden={}, root=0)
        drafter.started(self.now)
        self.committed(len(prompt), [1])

    def states(self) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        numbers = iter(range(self.model.config.layers))

        def through(block: Any, x: torch.Tensor, rope: Any) -> torch.Tensor:
            found[next(numbers)] = x = block(x, rope)
            return x

        with torch.no_grad():
            self.model.hidden(torch.tensor([self.now.tokens]), through)
        return {layer: x[0] for layer, x in found.items()}

    def committed(self, count: int, more: Sequence[int]) -> None:
        """The target has committed `count` more tokens, and goes on with these."""
        states = self.states()
        self.now.hidden = {layer: x[-count:] for layer, x in states.items()}
        self.now.tokens += more
        self.now.root = self.now.tokens[-1]

    def round(self, accepted: Sequence[int], drafts: bool) -> None:
        if drafts:
            self.drafter.propose([self.now], [Budget(6, 4)])
        else:
            self.drafter.passed(self.now)
        # root and accepted tokens are committed; the last of what the target decides is not
        self.committed_next(accepted)

    def committed_next(self, accepted: Sequence[int]) -> None:
        self.now.tokens += accepted[:-1]
        self.committed(len(accepted), accepted[-1:])

    def rows(self) -> torch.Tensor:
        """Keys and values of the drafter for this sequence."""
        (part,) = self.drafter.trees.state.parts
        count = part.lengths[self.now.slot]
        rows = [x[0, self.now.slot, :, :count] for x in (part.keys, part.values)]
        return torch.cat(rows, -1)


@settings(max_examples=settings().max_examples * 25 // 20, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4), st.booleans()),
        max_size=6,
    ),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
)
def test_the_cache_is_that_of_a_fresh_prefill(
    rounds: list[tuple[list[int], bool]], prompt: list[int]
) -> None:
    model = tiny_model("softmax", "aug", "softmax")
    drafter, fresh = random_eagle(model), random_eagle(model)
    followed = Sequences(model, drafter, 1, prompt)
    for accepted, drafts in rounds:
        followed.round(accepted, drafts)
    (tree,) = drafter.propose([followed.now], [Budget(9, 4)])
    whole = Sequences(model, fresh, 2, followed.now.tokens[:-1])
    whole.now.tokens[-1:] = followed.now.tokens[-1:]
    whole.now.root = followed.now.root
    (again,) = fresh.propose([whole.now], [Budget(9, 4)])
    assert (tree.tokens, tree.parents) == (again.tokens, again.parents)
    assert len(tree) > 4
    torch.testing.assert_close(followed.rows(), whole.rows(), rtol=0, atol=1e-5)
    assert followed.rows().shape[1] == len(followed.now.tokens) - 1
    # the same round gives the same tree
    assert drafter.propose([followed.now], [Budget(9, 4)]) == [tree]


def test_a_sequence_whose_states_were_missed_begins_anew() -> None:
    """With what was handed out last, and with nothing where that was nothing."""
    model = tiny_model("softmax")
    drafter = random_eagle(model)
    followed = Sequences(model, drafter, 0, [1, 2, 3])
    followed.committed_next([4, 5])
    assert len(drafter.propose([followed.now], [Budget(4, 4)])[0]) == 5
    assert followed.rows().shape[1] == 2
    followed.committed_next([6])
    followed.now.hidden = {}
    assert len(drafter.propose([followed.now], [Budget(4, 4)])[0]) == 1
    followed.committed_next([7, 8, 9])
    assert len(drafter.propose([followed.now], [Budget(4, 4)])[0]) == 5
    assert followed.rows().shape[1] == 3


@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_who_was_long_idle_reads_the_newest_positions_only(rounds: int) -> None:
    model = tiny_model("softmax")
    drafter, tokens = random_eagle(model, history=5), random_tokens(30)
    followed = Sequences(model, drafter, 0, tokens[:9])
    drafter.propose([followed.now], [Budget(4, 4)])
    assert followed.rows().shape[1] == 5
    for at in range(rounds):
        followed.round([tokens[9 + at]], drafts=False)
    (tree,) = drafter.propose([followed.now], [Budget(4, 4)])
    whole = rounds + 1 > 5
    assert followed.rows().shape[1] == (5 if whole else 5 + rounds)
    if whole:
        short = Sequences(model, random_eagle(model), 1, followed.now.tokens[:-1])
        short.now.hidden = {layer: x[-5:] for layer, x in short.now.hidden.items()}
        short.now.tokens[-1:] = followed.now.tokens[-1:]
        short.now.root = followed.now.root
        assert short.drafter.propose([short.now], [Budget(4, 4)]) == [tree]


def test_what_failed_half_way_is_no_part_of_later_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("softmax")
    drafter = random_eagle(model)
    followed = Sequences(model, drafter, 0, random_tokens(8))
    drafter.propose([followed.now], [Budget(4, 4)])
    followed.committed_next([3, 4])

    def fail(asked: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(drafter.trees, "_catch_up", fail)
        with pytest.raises(RuntimeError):
            drafter.propose([followed.now], [Budget(4, 4)])
    (tree,) = drafter.propose([followed.now], [Budget(4, 4)])
    # the two entries whose states are still there
    assert len(tree) == 5 and followed.rows().shape[1] == 2


def test_a_draft_goes_on_from_its_own_states() -> None:
    """Every node against the same path drafted token by token."""
    model = tiny_model("softmax", "softmax")
    drafter, tokens = random_eagle(model), random_tokens(7)
    followed = Sequences(model, drafter, 0, tokens)
    (tree,) = drafter.propose([followed.now], [Budget(12, 4)])
    assert tree.shape.deepest > 1 and tree.confidences is not None
    net, read = drafter.net, [followed.now.hidden[layer] for layer in drafter.net.config.reads]
    with torch.no_grad():
        states = net.fused(torch.cat(read, -1))
    for node in range(1, len(tree)):
        path = [tree.tokens[at] for at in tree.path_to(node)]
        cache = net.decoder.new_state(1)
        given = StepInput(0, followed.now.tokens[1:], embeddings=states)
        out = net.decoder.step([given], cache, want=BOTH)
        cache.commit(0, range(len(given.tokens)))
        for place, token in enumerate(path[1:-1]):
            state = net.fed_back(out.hidden[-1:], out.layers[0][-1:])
            given = StepInput(0, [token], [place - 1], embeddings=state)
            out = net.decoder.step([given], cache, want=BOTH)
        shares = out.logits[-1].softmax(-1)
        at = net.drafted.tolist().index(path[-1])
        assert float(shares[at]) == pytest.approx(tree.confidences[node], abs=1e-6)


# ---- outputs


class Now(Policy):
    """Drafts in some rounds of some sequences."""

    name = "test-now-and-then"

    def plan(self, rows: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        return [Budget((0, 2, 5, 14)[(len(row.tokens) + row.number) % 4], 4) for row in rows]


@pytest.mark.crossed(2)
@pytest.mark.parametrize("mixer", ["softmax", "aug"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("changes", [{}, {"own_head": False, "normed": False}], ids=["new", "old"])
def test_greedy_outputs_of_ragged_batches_stay(
    mixer: str, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    model = tiny_model(mixer, dtype=dtype)
    plain = outputs(decode(model, PROMPTS, GREEDY))
    drafter = Lucky(random_net(model, **changes), slots=4)
    rows = decode(model, PROMPTS, GREEDY, drafter, policy=Now(), prefill_tokens=5)
    assert outputs(rows) == plain
    assert sum(row.stats.accepted for row in rows) > 9


def test_sampled_outputs_stay() -> None:
    model = tiny_model("softmax")
    params = [SamplingParams(max_tokens=24, temperature=0.9, seed=n) for n in range(len(PROMPTS))]
    plain = outputs(decode(model, PROMPTS, params))
    rows = decode(model, PROMPTS, params, Lucky(random_net(model), slots=4), policy=Now())
    assert outputs(rows) == plain


def test_slots_are_used_again_and_positions_end() -> None:
    model = tiny_model("softmax", max_positions=40)
    params = SamplingParams(max_tokens=60)
    plain = outputs(decode(model, PROMPTS, params, slots=1))
    rows = decode(model, PROMPTS, params, Eagle(random_net(model), slots=2), slots=2)
    assert outputs(rows) == plain and max(len(row.tokens) for row in rows) == 41


@pytest.mark.parametrize("bits", [None, 8])
def test_prepared_targets_are_drafted_for(bits: int | None) -> None:
    model = tiny_model("softmax", dtype=torch.float32)
    net = random_net(model)
    model.to_inference(*([Quantizer(bits, {})] if bits else []))
    plain = outputs(decode(model, PROMPTS, GREEDY))
    rows = decode(model, PROMPTS, GREEDY, Eagle(net, slots=4), policy=Now())
    assert outputs(rows) == plain


def test_what_is_expected_grows_with_the_budget() -> None:
    drafter = random_eagle(tiny_model("softmax"))
    assert drafter.expected(Budget.of(1)) == pytest.approx(0.5)
    assert drafter.expected(Budget.of(2)) == pytest.approx(0.7)
    assert drafter.expected(Budget.of(3)) == pytest.approx(0.9)
    assert drafter.expected(Budget(3, 1)) == pytest.approx(0.8)


# ---- on disk


@pytest.mark.parametrize("own_head", [True, False])
def test_a_drafter_survives_the_disk_plain_and_in_8_bits(tmp_path: Path, own_head: bool) -> None:
    model = tiny_model("softmax", dtype=torch.float32)
    net = random_net(model, own_head=own_head)
    plain = save_drafter(net, model, tmp_path / "plain", dtype=None)
    again = EAGLE.load(plain, model)
    assert again.config == net.config and torch.equal(again.drafted, net.drafted)
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    packed = EAGLE.save(
        again.to_inference(Quantizer(8, {})), model, tmp_path / "packed", 8, {"loss": 1.0}
    )
    trees = []
    for drafter in (Eagle(net, 1), Eagle(EAGLE.load(packed, model), 1)):
        followed = Sequences(model, drafter, 0, random_tokens(9))
        trees += drafter.propose([followed.now], [Budget(6, 3)])
    # the kernels of this machine decide whether the first has 8 bits too
    assert trees[0].tokens[:2] == trees[1].tokens[:2]


def test_foreign_and_unmeasured_drafters_are_refused(tmp_path: Path) -> None:
    model = tiny_model("softmax", dtype=torch.float32)
    net = random_net(model)
    folder = save_drafter(net, model, tmp_path / "eagle")
    with pytest.raises(DrafterError, match="trained for another model"):
        EAGLE.load(folder, tiny_model("softmax", seed=4, dtype=torch.float32))
    net.accuracies = []
    with pytest.raises(DrafterError, match="never measured"):
        Eagle(net, 1)
    with pytest.raises(DrafterError, match="no drafter of kind 'eagle'"):
        Eagle.build(DrafterContext(model), EagleOptions())
    with pytest.raises(DrafterError, match="smaller top or depth"):
        EagleOptions(top=16, depth=8)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, (0,)), (2, (0, 1)), (4, (0, 2)), (9, (1, 3, 5)), (30, (1, 14, 26)), (32, (1, 15, 28))],
)
def test_the_layers_that_are_read(layers: int, expected: tuple[int, ...]) -> None:
    assert layers_to_read(layers) == expected
