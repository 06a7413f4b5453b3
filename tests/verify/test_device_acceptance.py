"""A step that judges trees: the walk of the verifiers, for all slots at once and with no word to the host."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linspec.decoding.accepted import Accepted
from linspec.decoding.device_acceptance import accept, chosen_tokens, next_round
from linspec.decoding.judged import BY_ARGMAX, JudgeBy, Judged
from linspec.decoding.sampling import Sampler, SamplingParams
from linspec.decoding.static_mask import SlotNodes, StepTables
from linspec.decoding.tree import TokenTree, chain, root_only, shape_of
from linspec.errors import NotFinite
from linspec.kernels.gpu.graphs import Recorded
from linspec.verifiers import GreedyVerifier, LosslessVerifier, TypicalVerifier
from linspec.verifiers.base import judge_by
from tests.op_tape import TapeRecorder

VOCAB = 5


@dataclass
class Case:
    """A tree with the scores [N, V] behind its nodes, and how it is judged."""

    tree: TokenTree
    logits: torch.Tensor
    judge: JudgeBy | None = BY_ARGMAX


def case(rng: random.Random, nodes: int, *, ties: bool = True) -> Case:
    """Any topology, siblings that are equal, scores that are; half of the drafts are right."""
    generator = torch.Generator().manual_seed(rng.randrange(2**20))
    logits = torch.randn(nodes, VOCAB, generator=generator)
    logits = (2 * logits).round() if ties else logits
    best, reach = logits.argmax(-1).tolist(), rng.choice((1, 3, nodes))
    parents, tokens = [-1], [rng.randrange(VOCAB)]
    for node in range(1, nodes):
        parent = rng.randrange(max(0, node - reach), node)
        parents.append(parent)
        tokens.append(best[parent] if rng.random() < 0.5 else rng.randrange(VOCAB))
    return Case(TokenTree(tuple(tokens), tuple(parents)), logits)


class Program:
    """What a step does behind its logits, for up to `slots` trees of up to `nodes` nodes, from a tape."""

    def __init__(self, slots: int, nodes: int, *, drawn: bool = False) -> None:
        self.tables = StepTables(slots, nodes, 0, torch.device("cpu"))
        self.logits = torch.zeros(slots, nodes, VOCAB)
        self.drawn, self.recorder = drawn, TapeRecorder()
        self.recorded = Recorded(self.recorder)

    def _program(self) -> tuple[torch.Tensor, ...]:
        chosen, finite = chosen_tokens(self.logits, self.tables, drawn=self.drawn)
        found = accept(self.tables, chosen)
        of_path = found.of_path(self.logits)
        return found.deepest, found.tokens, finite, found.rows, of_path, found.of_deepest(of_path)

    def of(self, cases: Sequence[Case]) -> list[Judged]:
        """What becomes of trees, each with the nodes that its `rows` name."""
        self.tables.fill(
            [
                SlotNodes(slot, tree.tokens, tree.depths, tree.shape, (), (), each.judge)
                for slot, each in enumerate(cases)
                for tree in (each.tree,)
            ]
        )
        for slot in range(len(self.logits)):
            rows = cases[min(slot, len(cases) - 1)].logits
            self.logits[slot, : len(rows)] = rows
            # what is computed for nodes that are not there is that of the last one
            self.logits[slot, len(rows) :] = rows[-1]
        results = self.recorded.run("", self._program)
        deepest, tokens, finite, rows = (each.tolist() for each in results[:4])
        found = []
        for slot, each in enumerate(cases):
            path = each.tree.path_to(deepest[slot])
            kept = len(path) if each.judge else 0
            own = range(kept, len(rows[slot]))
            assert rows[slot] == [*path[:kept], *own]
            if finite[slot]:
                assert torch.equal(results[4][slot, : len(path)], each.logits[list(path)])
            found.append(Judged(path, tokens[slot], bool(finite[slot])))
        return found


@given(seed=st.integers(0, 2**20), slots=st.integers(1, 4))
@settings(max_examples=settings().max_examples * 5)
def test_it_is_the_greedy_walk(seed: int, slots: int) -> None:
    """Ties, equal siblings, trees of one node, trees that are not judged, batches with room left."""
    rng, program = random.Random(seed), Program(slots, 16)
    sampler = Sampler(SamplingParams(), [0], VOCAB)
    for _ in range(3):
        cases = [case(rng, rng.choice((1, 2, 7, 16))) for _ in range(rng.randint(1, slots))]
        for each in cases:
            each.judge = rng.choice((BY_ARGMAX, BY_ARGMAX, None))
        for each, judged in zip(cases, program.of(cases), strict=True):
            if each.judge is None:
                assert judged.path == (0,)
            else:
                wanted = GreedyVerifier().accept(each.tree, each.logits, sampler)
                assert judged.accepted() == wanted
    assert program.recorder.recorded == 1


@given(seed=st.integers(0, 2**20), temperature=st.sampled_from((0.3, 1.0, 1.7)))
@settings(max_examples=settings().max_examples * 2)
def test_it_draws_what_the_verifier_draws(seed: int, temperature: float) -> None:
    """By the same numbers of the request, and as many; a greedy request beside them stays greedy."""
    rng, program = random.Random(seed), Program(3, 8, drawn=True)
    params = [
        SamplingParams(temperature=temperature, seed=seed),
        SamplingParams(temperature=2 * temperature, seed=seed + 1),
        SamplingParams(),
    ]
    mine, theirs = ([Sampler(each, [0], VOCAB) for each in params] for _ in range(2))
    for _ in range(3):
        cases = [case(rng, rng.choice((1, 3, 8)), ties=False) for _ in params]
        for each, sampler in zip(cases, mine, strict=True):
            each.judge = judge_by(LosslessVerifier(), each.tree, sampler)
        for i, (each, judged) in enumerate(zip(cases, program.of(cases), strict=True)):
            wanted = LosslessVerifier().accept(each.tree, each.logits, theirs[i])
            assert judged.accepted() == wanted
            if not mine[i].greedy:
                mine[i].spend(len(judged.path))
                assert mine[i].coming(1) == theirs[i].coming(1)


def host_tables(
    trees: Sequence[TokenTree], behind: Sequence[int], slots: int, nodes: int
) -> StepTables:
    """What the host writes for trees behind chains of so many staged nodes; slot n begins at position n."""
    tables, filled = StepTables(slots, nodes, 0, torch.device("cpu")), []
    for slot, (tree, before) in enumerate(zip(trees, behind, strict=True)):
        above = (before - 1, *(before + parent for parent in tree.parents[1:]))
        shape = shape_of((*range(-1, before - 1), *above))
        positions = [slot + before + depth for depth in tree.depths]
        filled.append(SlotNodes(slot, tree.tokens, positions, shape, (), (), None))
    tables.fill(filled)
    return tables


@given(seed=st.integers(0, 2**20), slots=st.integers(1, 3))
@settings(max_examples=settings().max_examples * 3)
def test_the_next_round_has_the_tables_that_the_host_would_write(seed: int, slots: int) -> None:
    rng = random.Random(seed)
    cases = [case(rng, rng.choice((1, 2, 5, 8))) for _ in range(rng.randint(1, slots))]
    trees = [
        replace(each.tree, regrow=(0, *(rng.randrange(4) for _ in each.tree.tokens[1:])))
        for each in cases
    ]
    tables = StepTables(slots, 8, 0, torch.device("cpu"))
    by = [JudgeBy(regrow=tree.regrow) for tree in trees]
    tables.fill(
        [
            SlotNodes(n, tree.tokens, [n + d for d in tree.depths], tree.shape, (), (), by[n])
            for n, tree in enumerate(trees)
        ]
    )
    behind = [0] * len(cases)
    for _ in range(4):
        # whatever the target says
        best = torch.randint(VOCAB, (len(cases), 8))
        follow = torch.randint(VOCAB, (len(cases), 3))
        wide = [min(row, len(cases) - 1) for row in range(slots)]
        found = accept(tables, best[wide])
        for slot, tree in enumerate(trees):
            behind[slot] += int(found.lengths[slot])
            tokens = tree.regrown(int(found.tokens[slot]), follow[slot].tolist())
            trees[slot] = replace(tree, tokens=tokens)
        tables.put(next_round(tables, found, follow[wide]))
        wanted = host_tables(trees, behind, slots, 8)
        for name in ("tokens", "positions", "nodes", "slots", "depths", "ancestors"):
            mine, theirs = getattr(tables, name), getattr(wanted, name)
            if name == "depths":
                # of nodes that are not there nobody asks
                mine, theirs = mine * (wanted.ancestors != 0), theirs * (wanted.ancestors != 0)
            assert torch.equal(mine, theirs), name


def test_all_of_sixty_four_nodes() -> None:
    logits = torch.eye(VOCAB)[torch.arange(1, 65) % VOCAB]
    tree = chain([i % VOCAB for i in range(64)])
    assert Program(1, 64).of([Case(tree, logits)]) == [Judged(tuple(range(64)), 64 % VOCAB, True)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_end_their_own_tree(value: float) -> None:
    rng = random.Random(0)
    cases = [case(rng, 3), case(rng, 4)]
    good = Program(2, 4).of(cases)[1]
    # of a node that the walk need not come to
    cases[0].logits[2, 3] = value
    bad, other = Program(2, 4).of(cases)
    assert other == good
    with pytest.raises(NotFinite):
        bad.accepted()


def test_banned_tokens_are_no_fault() -> None:
    logits = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf, 0.5]])
    (judged,) = Program(1, 1).of([Case(root_only(2), logits)])
    assert judged.accepted() == Accepted((0,), 1, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {1: 1.0}},
        {"repetition_penalty": 1.2},
        {"min_tokens": 3},
        {"bad_words": ((1, 2),)},
        {"logprobs": 0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 0.7, "allowed_token_ids": (1, 2)},
    ],
)
def test_whatever_needs_the_scores_is_judged_on_the_host(changes: dict[str, object]) -> None:
    sampler = Sampler(SamplingParams(**changes), [0], VOCAB, eos_ids=(4,))  # type: ignore[arg-type]
    assert judge_by(LosslessVerifier(), root_only(0), sampler) is None


def test_which_rules_a_step_may_stand_for() -> None:
    sampled = Sampler(SamplingParams(temperature=0.7, seed=0), [0], VOCAB)
    greedy = Sampler(SamplingParams(top_p=0.5), [0], VOCAB)
    drawn = chain([0, 1], {0: torch.full((VOCAB,), 1 / VOCAB)})
    # the likeliest token is the same whatever top-p leaves, and whatever drafts were drawn from
    assert judge_by(LosslessVerifier(), drawn, greedy) == BY_ARGMAX
    assert judge_by(LosslessVerifier(), chain([0, 1]), sampled) is not None
    assert judge_by(LosslessVerifier(), drawn, sampled) is None
    # the greedy verifier refuses to sample, and the typical one has a rule of its own
    assert judge_by(GreedyVerifier(), chain([0, 1]), sampled) is None
    assert judge_by(TypicalVerifier(), chain([0, 1]), sampled) is None
    assert judge_by(TypicalVerifier(), chain([0, 1]), greedy) == BY_ARGMAX
