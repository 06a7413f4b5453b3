"""Block drafters in use: lossless for every target, and what they keep is what a fresh one would compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.checkpoints.gguf.model import load_gguf
from linspec.decoding.request import Request
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import Want
from linspec.decoding.tree import NO_DRAFTS, Budget, TokenTree, chain, root_only
from linspec.drafters import Drafter, DrafterContext, make_drafter
from linspec.drafters.block import Block
from linspec.drafters.block_cache import Asked, BlockCache, draft
from linspec.drafters.block_net import BlockNet, Measured
from linspec.drafters.packed_block import PackedBlockNet
from linspec.drafters.saved import load_drafter, save_drafter
from linspec.engine.engine import Engine
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer, fused_linear
from linspec.policies.base import Policy
from linspec.policies.fixed import Fixed
from linspec.train.drafters.block import block_loss
from linspec.train.drafters.states import states_of
from linspec.verifiers import LosslessVerifier
from linspec.verifiers.base import may_cut
from tests.block_drafters import SHAPE, VOCAB, make_net, make_target


def states(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, SHAPE.width, generator=generator) for _ in SHAPE.read]


def cache_of(net: BlockNet) -> BlockCache:
    return BlockCache(net.config, torch.device("cpu"), torch.float32)


def asked(
    given: Sequence[torch.Tensor],
    position: int,
    new: int,
    root: int,
    slot: int = 0,
    number: int = 7,
) -> Asked:
    return Asked(slot, number, root, position, [[s[position - new : position] for s in given]])


@settings(deadline=None, max_examples=25)
@given(
    prompt=st.integers(1, 30),
    rounds=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    window=st.sampled_from([1, 3, 6, 64]),
)
def test_the_cache_after_any_accepted_drafts_is_that_of_a_fresh_start(
    prompt: int, rounds: list[int], window: int
) -> None:
    net = make_net(make_target(), replace(SHAPE, window=window))
    text, kept = states(100), cache_of(net)
    position = prompt
    draft(net, kept, [asked(text, position, prompt, 3)])
    for new in rounds:
        position += new
        found = draft(net, kept, [asked(text, position, new, position % VOCAB)])
        fresh = cache_of(net)
        again = draft(net, fresh, [asked(text, position, position, position % VOCAB)])
        assert found[0] == again[0]
        torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(again[1]))
        for (k, v), (fresh_k, fresh_v) in zip(kept.seen([0])[0], fresh.seen([0])[0], strict=True):
            torch.testing.assert_close(k, fresh_k)
            torch.testing.assert_close(v, fresh_v)


def test_a_round_that_is_asked_again_drafts_the_same() -> None:
    net = make_net(make_target())
    text, kept = states(40), cache_of(net)
    first = draft(net, kept, [asked(text, 20, 20, 3)])
    assert draft(net, kept, [asked(text, 20, 20, 3)]) == first
    draft(net, kept, [asked(text, 22, 2, 3)])
    assert kept.counts[0] == 6 + 2


def test_sequences_of_a_batch_draft_as_they_would_alone() -> None:
    net = make_net(make_target())
    text, together = states(60), cache_of(net)
    rounds = [[(2, 1, 1), (0, 30, 30)], [(0, 33, 3), (2, 4, 3), (1, 9, 9)], [(2, 5, 1), (1, 10, 1)]]
    alone = {slot: cache_of(net) for slot in range(3)}
    for each in rounds:
        found = draft(net, together, [asked(text, at, new, at, slot) for slot, at, new in each])
        for i, (slot, at, new) in enumerate(each):
            single = draft(net, alone[slot], [asked(text, at, new, at, 0)])
            assert single[0] == [found[0][i]]
            assert single[1][0] == pytest.approx(found[1][i], abs=1e-5)


def test_another_request_in_a_slot_finds_nothing_of_the_one_before() -> None:
    net = make_net(make_target())
    kept, text = cache_of(net), states(30)
    draft(net, kept, [asked(text, 30, 30, 3, number=1)])
    other = states(40, seed=9)
    found = draft(net, kept, [asked(other, 35, 35, 3, number=2)])
    fresh = draft(net, cache_of(net), [asked(other, 35, 35, 3, number=2)])
    assert found == fresh


def test_rounds_that_were_never_shown_leave_a_gap_and_no_error() -> None:
    net = make_net(make_target())
    kept, text = cache_of(net), states(60)
    draft(net, kept, [asked(text, 20, 20, 3)])
    # what was committed at 20..24 was never shown
    draft(net, kept, [asked(text, 26, 1, 3)])
    assert (kept.counts[0], kept.ends[0]) == (6 + 1, 26)


def running(tokens: list[int], hidden: dict[int, torch.Tensor]) -> RunningSequence:
    sampler = Sampler(SamplingParams(), tokens, VOCAB)
    sequence = RunningSequence(0, sampler, tokens, len(tokens) - 1)
    sequence.slot, sequence.hidden = 0, hidden
    return sequence


def test_trees_are_chains_with_confidences_within_the_budget() -> None:
    drafter = Block(make_net(make_target()))
    assert drafter.needs == Want((0, 1)) and drafter.max_nodes == 4
    given = dict(zip((0, 1), states(10), strict=True))
    whole = drafter.propose([running(list(range(11)), given)], [Budget(9, 9)])[0]
    assert len(whole) == 5 and whole.shape.is_chain and whole.confidences is not None
    assert whole.confidences[0] == 1.0 and all(0 < c < 1 for c in whole.confidences[1:])
    part = drafter.propose([running(list(range(11)), given)], [Budget(2, 9)])[0]
    assert (part.tokens, part.confidences) == (whole.tokens[:3], whole.confidences[:3])
    assert drafter.propose([running([5], {})], [Budget(2, 2)])[0].tokens == (5,)
    assert drafter.propose([], []) == []


def test_expected_tokens_are_products_of_what_was_measured() -> None:
    net = make_net(make_target())
    net.measured = Measured([0.5, 0.4, 0.2, 0.1], [1.0] * 4)
    drafter = Block(net)
    assert drafter.expected(Budget(2, 5)) == pytest.approx(0.5 + 0.2)
    assert drafter.expected(Budget(50, 50)) == pytest.approx(0.5 + 0.2 + 0.04 + 0.004)
    net.measured = Measured()
    with pytest.raises(DrafterError, match="never measured"):
        Block(net)


def test_a_saved_drafter_is_the_same_again(tmp_path: Path) -> None:
    target = make_target()
    net = make_net(target)
    save_drafter(net, target, tmp_path / "d", dtype=None)
    made = load_drafter(tmp_path / "d", target, BlockNet)
    assert (made.config, made.measured) == (net.config, net.measured)
    text = states(30)
    ask = [asked(text, 30, 30, 3)]
    assert draft(made, cache_of(made), ask) == draft(net, cache_of(net), ask)
    found = make_drafter(f"block:{tmp_path / 'd'}", DrafterContext(target))
    assert isinstance(found, Block)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layout": "fill"}, "layout must be 'shift'"),
        ({"read": (1, 0)}, "ascending order"),
        ({"read": ()}, "ascending order"),
        ({"places": 33}, "32 places at most"),
        ({"vocabulary": 71}, "cannot draft 71 tokens of the 70"),
        ({"head_width": 15}, "even"),
    ],
)
def test_impossible_shapes_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SHAPE, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"acceptance": [0.5]}, "acceptance has 1 entries for 4 places"),
        ({"acceptance": [2.0, 0, 0, 0]}, "shares in 0..1"),
        ({"auc": [2.0, 0, 0, 0]}, "shares in 0..1"),
        ({"temperatures": [0.0, 1, 1, 1]}, "above 0"),
        ({"read": [0, 7]}, "reads layer 7, and this model has 3 layers"),
    ],
)
def test_a_wrong_description_is_refused(changed: dict[str, Any], message: str) -> None:
    target = make_target()
    data = make_net(target).described() | changed
    with pytest.raises(DrafterError, match=message):
        BlockNet.from_description(data, target, Path("d/drafter.json"))


def test_a_missing_drafter_is_named() -> None:
    with pytest.raises(DrafterError, match="no drafter of kind 'block' in nowhere"):
        make_drafter("block:nowhere", DrafterContext(make_target()))


def learned(target: Decoder) -> BlockNet:
    """A drafter that has learned enough of a random target to have drafts accepted now and then."""
    net = make_net(target, replace(SHAPE, vocabulary=0)).requires_grad_(True)
    ids = torch.randint(0, VOCAB, (4, 25), generator=torch.Generator().manual_seed(3))
    found = states_of(target, ids, SHAPE.read)
    net.initialize(torch.Generator().manual_seed(0), [found.layers[n] for n in SHAPE.read])
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        block_loss(net, found, every=1, decay=0.8).backward()
        optimizer.step()
    return net.requires_grad_(False).eval()


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    drafter: Block | None,
    policy: Policy | None = None,
) -> list[RunningSequence]:
    engine = Engine(
        model,
        verifier=LosslessVerifier(),
        drafter=drafter,
        policy=policy or Fixed(4),
        slots=2,
        prefill_tokens=7,
    )
    asked = [engine.add(Request(tuple(p), params)) for p in prompts]
    done: dict[int, RunningSequence] = {}
    while engine.busy:
        for emitted in engine.step():
            if emitted.finished:
                done[emitted.sequence.request] = emitted.sequence
    return [done[request] for request in asked]


FORMS: dict[str, Any] = {"float": fused_linear, "int8": Quantizer(8, {})}


@pytest.mark.crossed(3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixer", ["softmax", "aug", "gdn"])
def test_outputs_are_those_of_plain_decoding(mixer: str, form: str) -> None:
    target = make_target(mixer).requires_grad_(False)
    net = learned(target)
    target.to_inference(FORMS[form])
    net = net if form == "float" else PackedBlockNet.of(net, Quantizer(8, {}))
    prompts = [[5], list(range(20)), [7, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8]]
    accepted = 0
    for params in (
        SamplingParams(max_tokens=14, ignore_eos=True),
        SamplingParams(max_tokens=14, ignore_eos=True, temperature=0.9, seed=3),
        SamplingParams(max_tokens=9, ignore_eos=True, repetition_penalty=1.3),
    ):
        plain = decode(target, prompts, params, None)
        drafted = decode(target, prompts, params, Block(net))
        assert [row.tokens for row in drafted] == [row.tokens for row in plain]
        accepted += sum(row.stats.accepted for row in drafted)
    assert accepted > 0


class EveryOther(Fixed):
    """A policy that drafts in every other round."""

    asked = 0

    def plan(self, sequences: Sequence[RunningSequence], drafter: Drafter) -> list[Budget]:
        self.asked += 1
        budgets = super().plan(sequences, drafter)
        return budgets if self.asked % 2 else [NO_DRAFTS for _ in budgets]


def test_a_policy_that_skips_rounds_hides_no_states_from_the_drafter() -> None:
    target = make_target().requires_grad_(False)
    drafter, begins, ends = Block(make_net(target)), [], []
    enter = drafter.cache.enter

    def spy(slot: int, more: int, end: int) -> None:
        begins.append(end - more)
        ends.append(end)
        enter(slot, more, end)

    drafter.cache.enter = spy  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    decode(target, [[1, 2, 3]], params, drafter, EveryOther(4))
    assert len(ends) > 5 and begins == [0, *ends[:-1]]


def test_outputs_of_weights_in_blocks_are_those_of_plain_decoding(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m.gguf", "Q8_0")[1]
    target = load_gguf(path, torch.float32, keep_blocks=True)
    size = {"width": target.config.width, "vocab_size": target.config.vocab_size}
    shape = replace(SHAPE, **size, read=(0, target.config.layers - 1))
    net = PackedBlockNet.of(make_net(target, shape), Quantizer(8, {}))
    params = SamplingParams(max_tokens=14, ignore_eos=True)
    prompts = [[5], list(range(20)), [7, 7, 9]]
    plain = decode(target, prompts, params, None)
    drafted = decode(target, prompts, params, Block(net))
    assert [row.tokens for row in drafted] == [row.tokens for row in plain]
    assert all(row.stats.drafted for row in drafted)


def test_a_draft_may_decide_on_its_own_admission_where_the_target_is_sampled() -> None:
    """The example of DSpark's paper, section 3.3: p_t = (.7, .3), drafts from (.5, .5).

    A global search admits draft A, whose confidence promises more behind it, and not draft B. A rule that
    divides by the drafter's distribution then gives A with .85; a rule that samples the target and
    follows a draft that matches gives .7, which is why `may_cut` allows cuts there alone.
    """
    target, drafts = torch.tensor([[0.7, 0.3]] * 2).log(), torch.tensor([0.5, 0.5])
    verifier, count = LosslessVerifier(), 4000
    divided = sampled = 0
    for seed in range(count):
        token = seed % 2
        params = SamplingParams(temperature=1.0, seed=seed)

        def next_token(tree: TokenTree, params: SamplingParams = params) -> int:
            found = verifier.accept(tree, target[: len(tree)], Sampler(params, [0], 2))
            return found.emitted(tree)[0]

        certain = chain((0, token), None)
        drawn = chain((0, token), {0: drafts})
        assert may_cut(verifier, certain) and not may_cut(verifier, drawn)
        admitted = 2 if token == 0 else 1
        # whatever is admitted, the token is that of plain decoding
        assert next_token(certain.first(admitted)) == next_token(root_only(0))
        sampled += next_token(certain.first(admitted)) == 0
        divided += next_token(drawn.first(admitted) if admitted == 2 else root_only(0)) == 0
    assert sampled / count == pytest.approx(0.7, abs=0.025)
    assert divided / count == pytest.approx(0.85, abs=0.025)
