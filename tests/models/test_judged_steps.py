"""Steps of static shape that judge their trees: as the verifier judges the step by layers, and its states."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.judged import BY_ARGMAX, JudgeBy, Judged, Onward
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.step import FINAL, StepInput, Want
from linspec.decoding.target import NodeOutput, Target
from linspec.decoding.tree import TokenTree, chain, root_only
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.models.static_step import StaticStep
from linspec.state.sequence_states import SequenceStates
from linspec.verifiers import GreedyVerifier
from tests.helpers import (
    VOCAB,
    assert_close,
    feed,
    full_logits,
    random_tokens,
    random_tree,
    tiny_model,
)
from tests.models.test_static_step import STATIC, pair
from tests.op_tape import TapeRecorder

WANT = Want(layers=(FINAL, 0))
GREEDY = Sampler(SamplingParams(), (), VOCAB)


def tree_after(rng: random.Random, model: Decoder, text: Sequence[int], nodes: int) -> TokenTree:
    """Any tree behind a text whose last token is its root; half of its drafts are what the model says."""
    tree = random_tree(rng, nodes)
    tokens = [text[-1], *tree.tokens[1:]]
    for node in range(1, nodes):
        if rng.random() < 0.5:
            before = [tokens[n] for n in tree.path_to(tree.parents[node])[1:]]
            tokens[node] = int(full_logits(model, [[*text, *before]])[0].argmax())
    return TokenTree(tuple(tokens), tree.parents)


class Rounds:
    """The same rounds of two models: one judges in its steps, the other one by layers and the verifier."""

    def __init__(self, name: str, taps: int, texts: Sequence[Sequence[int]], kv: str = "float"):
        self.plain, self.static, self.recorder = pair(name, taps)
        self.texts = [list(text) for text in texts]
        models = (self.plain, self.static)
        self.targets = [Target(model, model.new_state(len(texts), kv)) for model in models]
        for slot, text in enumerate(self.texts):
            for target in self.targets:
                feed(target.model, target.state, text[:-1], slot)

    @property
    def states(self) -> list[SequenceStates]:
        return [target.state for target in self.targets]

    def next(self, trees: dict[int, TokenTree], hosted: Sequence[int] = ()) -> None:
        """A round of some slots; those of `hosted` are not judged by the step."""
        plain, static = self.targets
        given = [
            StepInput.tree(slot, tree, None if slot in hosted else BY_ARGMAX)
            for slot, tree in trees.items()
        ]
        steps = (target.step(given, want=WANT) for target in (plain, static))
        for (slot, tree), one, other in zip(trees.items(), *steps, strict=True):
            wanted = GreedyVerifier().accept(tree, one.logits, GREEDY)
            plain.state.commit(slot, wanted.path)
            static.state.commit(slot, self._staged(slot in hosted, wanted.path, one, other))
            if slot not in hosted:
                assert other.judged is not None
                assert other.judged.accepted() == wanted
            self.texts[slot] += wanted.emitted(tree)

    def _staged(
        self, hosted: bool, path: Sequence[int], one: NodeOutput, other: NodeOutput
    ) -> Sequence[int]:
        """The path among what the step has left staged, once its hidden states are found to be right."""
        if hosted:
            assert other.judged is None
            assert_close(one.logits, other.logits)
            return path
        assert other.judged is not None
        for layer in (FINAL, 0):
            assert_close(one.hidden[layer][list(path)], other.judged.hidden[layer])
        return range(len(path))

    def check_states(self) -> None:
        for slot in range(len(self.texts)):
            copies = (state.snapshot(slot) for state in self.states)
            for one, other in zip(*copies, strict=True):
                assert one.length == other.length
                # a window keeps at least what it needs: how much more depends on when it let go of some
                held = min(one.keys.shape[2], other.keys.shape[2])
                assert_close(one.keys[:, :, -held:], other.keys[:, :, -held:])
                assert_close(one.values[:, :, -held:], other.values[:, :, -held:])
                if one.sums is not None:
                    assert_close(one.sums, other.sums)


@pytest.mark.parametrize(("name", "taps"), STATIC)
def test_replayed_rounds_equal_those_of_the_host(name: str, taps: int) -> None:
    rng = random.Random(1)
    rounds = Rounds(name, taps, [random_tokens(5)])
    for _ in range(10):
        tree = tree_after(rng, rounds.plain, rounds.texts[0], rng.choice((1, 3, 4, 7)))
        rounds.next({0: tree})
    rounds.check_states()
    # sizes 1, 4 and 8, each recorded once, and that of the prompt, which is not judged
    assert rounds.recorder.recorded == 4


@settings(max_examples=settings().max_examples * 25 // 20)
@given(
    seed=st.integers(0, 2**20), name=st.sampled_from(["softmax", "aug", "gla", "by-head", "window"])
)
def test_any_rounds_of_several_slots(seed: int, name: str) -> None:
    """Ragged trees of some slots, a few of them judged on the host, in one step."""
    rng = random.Random(seed)
    rounds = Rounds(name, 3, [random_tokens(rng.randrange(2, 12), seed + i) for i in range(3)])
    for _ in range(4):
        chosen = sorted(rng.sample(range(3), rng.randint(1, 3)))
        trees = {
            slot: tree_after(rng, rounds.plain, rounds.texts[slot], rng.randint(1, 6))
            for slot in chosen
        }
        rounds.next(trees, [slot for slot in chosen if rng.random() < 0.3])
    rounds.check_states()


@pytest.mark.parametrize("kv", ["int8", "int4", "float16"])
def test_entries_in_other_formats_move_as_they_are(kv: str) -> None:
    rng = random.Random(3)
    rounds = Rounds("softmax", 0, [random_tokens(9), random_tokens(4, 1)], kv)
    for _ in range(4):
        trees = {n: tree_after(rng, rounds.plain, text, 5) for n, text in enumerate(rounds.texts)}
        rounds.next(trees)
    rounds.check_states()


def test_only_what_is_accepted_stays_staged() -> None:
    rounds = Rounds("softmax", 0, [random_tokens(4)])
    best = int(full_logits(rounds.plain, [rounds.texts[0]])[0].argmax())
    other = (best + 1) % VOCAB
    tree = TokenTree((rounds.texts[0][-1], other, best), (-1, 0, 0))
    target = rounds.targets[1]
    (output,) = target.step([StepInput.tree(0, tree, BY_ARGMAX)])
    assert output.judged is not None
    assert output.judged.path == (0, 2)
    assert target.state.staged(0).parents == (-1, 0)
    assert len(output.logits) == 0
    target.state.drop(0)
    assert target.state.length(0) == 3


def test_trees_behind_staged_nodes_are_left_to_the_host() -> None:
    rounds = Rounds("softmax", 0, [random_tokens(4)])
    target = rounds.targets[1]
    target.step([StepInput(0, [3])])
    (output,) = target.step([StepInput(0, [4, 5], (0, 1), judge=BY_ARGMAX)])
    assert output.judged is None
    assert output.logits.shape == (2, VOCAB)


def test_prompts_and_judged_trees_share_a_step() -> None:
    """A long prompt goes layer by layer, a short one beside the tree; both have their logits."""
    rounds = Rounds("aug", 3, [random_tokens(4), [1, 2], [1, 2]])
    for state in rounds.states:
        state.reset(1)
        state.reset(2)
    tree = tree_after(random.Random(0), rounds.plain, rounds.texts[0], 4)
    inputs = [
        StepInput(2, random_tokens(70), all_logits=False),
        StepInput.tree(0, tree, BY_ARGMAX),
        StepInput(1, random_tokens(5), all_logits=False),
    ]
    one, other = (target.step(inputs) for target in rounds.targets)
    for number in (0, 2):
        assert_close(one[number].logits, other[number].logits)
    wanted = GreedyVerifier().accept(tree, one[1].logits, GREEDY)
    assert other[1].judged is not None
    assert other[1].judged.accepted() == wanted


def test_what_follows_is_part_of_the_program() -> None:
    """By the state of the last accepted node and the token behind it, replayed."""
    rng, recorder = random.Random(2), TapeRecorder()
    rounds = Rounds("softmax", 0, [random_tokens(4), random_tokens(6, 1)])
    rounds.static.native = StaticStep(rounds.static, recorder)

    def follow(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = rounds.static.head(hidden)
        return torch.cat((logits.topk(2).indices, tokens[:, None]), 1)

    target = rounds.targets[1]
    for _ in range(4):
        trees = [tree_after(rng, rounds.plain, text, 4) for text in rounds.texts]
        given = [StepInput.tree(slot, tree, BY_ARGMAX) for slot, tree in enumerate(trees)]
        for slot, output in enumerate(target.step(given, want=Want(onward=Onward(follow)))):
            judged = output.judged
            assert judged is not None
            logits = rounds.static.head(judged.hidden[FINAL][-1])
            assert list(judged.follow) == [*logits.topk(2).indices.tolist(), judged.token]
            assert judged.follow[0] == judged.token
            target.state.commit(slot, range(len(judged.path)))
            rounds.texts[slot] += judged.accepted().emitted(trees[slot])
    assert recorder.recorded == 1


def ahead(rounds: Rounds, trees: dict[int, TokenTree], count: int) -> None:
    """Rounds that the device runs in a row are those that the host makes one by one, of regrown trees."""
    plain, static = rounds.targets
    state, head, want = static.state, rounds.static.head, Want((FINAL, 0))

    def follow(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        # some right, and some wrong
        return torch.cat((tokens[:, None], head(hidden).topk(3).indices), 1)

    given = [
        StepInput.tree(slot, tree, JudgeBy(regrow=tree.regrow)) for slot, tree in trees.items()
    ]
    steps = static.step(given, want=replace(want, onward=Onward(follow, count)))
    found: dict[int, Judged] = {}
    for slot, output in zip(trees, steps, strict=True):
        assert output.judged is not None
        found[slot] = output.judged
    lengths = dict.fromkeys(trees, 0)
    for number in range(count):
        for slot, tree in trees.items():
            (one,) = plain.step([StepInput.tree(slot, tree)], want=want)
            wanted = GreedyVerifier().accept(tree, one.logits, GREEDY)
            plain.state.commit(slot, wanted.path)
            judged = found[slot]
            assert judged.accepted() == wanted
            for layer in (FINAL, 0):
                assert_close(one.hidden[layer][list(wanted.path)], judged.hidden[layer])
            lengths[slot] += len(wanted.path)
            assert len(state.staged(slot)) == lengths[slot]
            rounds.texts[slot] += wanted.emitted(tree)
        if number + 1 < count:
            trees = {
                slot: replace(tree, tokens=tree.regrown(found[slot].token, found[slot].follow))
                for slot, tree in trees.items()
            }
            found = {slot: judged.next() for slot, judged in found.items() if judged.next}
    assert all(judged.next is None for judged in found.values())
    for slot, length in lengths.items():
        state.commit(slot, range(length))


def regrowing(rng: random.Random, root: int, nodes: int) -> TokenTree:
    """A tree whose tokens are those that `ahead` finds again: at most three deep."""
    tree = random_tree(rng, nodes, depth=2)
    regrow = (0, *(rng.randrange(5) for _ in tree.tokens[1:]))
    return replace(tree, tokens=(root, *tree.tokens[1:]), regrow=regrow)


@pytest.mark.parametrize(("name", "taps"), STATIC)
def test_rounds_in_a_row_equal_those_of_the_host(name: str, taps: int) -> None:
    """Across the borders of groups, which are closed when all are committed."""
    rng = random.Random(4)
    rounds = Rounds(name, taps, [random_tokens(5)])
    for nodes, count in ((1, 9), (3, 6), (4, 3), (1, 2)):
        ahead(rounds, {0: regrowing(rng, rounds.texts[0][-1], nodes)}, count)
    rounds.check_states()


@settings(max_examples=settings().max_examples)
@given(seed=st.integers(0, 2**20), name=st.sampled_from(["softmax", "aug", "gla", "by-head"]))
def test_rounds_in_a_row_of_several_slots(seed: int, name: str) -> None:
    """Trees of different shapes, between rounds that the host makes."""
    rng = random.Random(seed)
    rounds = Rounds(name, 3, [random_tokens(rng.randrange(2, 12), seed + i) for i in range(3)])
    for _ in range(3):
        chosen = sorted(rng.sample(range(3), rng.randint(1, 3)))
        trees = {slot: regrowing(rng, rounds.texts[slot][-1], rng.randint(1, 5)) for slot in chosen}
        if rng.random() < 0.3:
            rounds.next(trees)
        else:
            ahead(rounds, trees, rng.randint(1, 5))
    rounds.check_states()


def test_rounds_end_where_no_more_nodes_can_be_staged() -> None:
    rounds = Rounds("softmax", 0, [random_tokens(5)])
    tree = replace(chain([rounds.texts[0][-1], *range(15)]), regrow=(0,) * 16)
    given = [StepInput.tree(0, tree, JudgeBy(regrow=tree.regrow))]
    (output,) = rounds.targets[1].step(given, want=Want(onward=Onward(rounds=20)))
    judged, count = output.judged, 1
    while judged is not None and judged.next is not None:
        judged, count = judged.next(), count + 1
    # each of them could have accepted sixteen nodes
    assert count == 4


def test_rounds_in_a_row_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds("softmax", 0, [random_tokens(5)])
    rounds.static.native = StaticStep(rounds.static, None, runs_ahead=False)
    given = [StepInput.tree(0, root_only(3), BY_ARGMAX)]
    (output,) = rounds.targets[1].step(given, want=Want(onward=Onward(rounds=4)))
    assert output.judged is not None
    assert output.judged.next is None
    monkeypatch.setenv("LINSPEC_ROUNDS_AHEAD", "of")
    with pytest.raises(ConfigError, match="did you mean 'off'"):
        tiny_model("softmax").to_inference()


def test_one_round_where_the_host_judges_somebody() -> None:
    rounds = Rounds("softmax", 0, [random_tokens(5), random_tokens(5)])
    given = [
        StepInput.tree(slot, root_only(3), judge) for slot, judge in enumerate((BY_ARGMAX, None))
    ]
    one, other = rounds.targets[1].step(given, want=Want(onward=Onward(rounds=4)))
    assert one.judged is not None
    assert one.judged.next is None
    assert len(other.logits) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["softmax", "aug", "gla"])
def test_a_captured_round_gives_the_tokens_of_its_program(name: str) -> None:
    from linspec.kernels.gpu.graphs import CudaGraphs

    model = tiny_model(name, device="cuda").to_inference()
    found = []
    for native in (StaticStep(model, CudaGraphs()), StaticStep(model, None)):
        model.native, rng = native, random.Random(2)
        state, tokens, root = model.new_state(1), [], 3
        for _ in range(8):
            tree = random_tree(rng, rng.choice((1, 3, 4)))
            tree = TokenTree((root, *tree.tokens[1:]), tree.parents)
            (output,) = Target(model, state).step([StepInput.tree(0, tree, BY_ARGMAX)])
            assert output.judged is not None
            state.commit(0, range(len(output.judged.path)))
            root = output.judged.token
            tokens.append(output.judged.accepted())
        found.append(tokens)
    assert found[0] == found[1]
