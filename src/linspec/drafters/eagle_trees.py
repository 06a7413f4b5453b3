"""How the one layer of an EAGLE drafter makes trees: level by level, or in one call of the C library.

trees = make_trees(net, slots=4, top=4)
(tree,) = trees.grow([Asked(slot, root, tokens, pieces, nodes, depth)])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linspec.decoding.step import MAX_STAGED, StepInput, StepOutput
from linspec.decoding.tree import Budget, TokenTree, chain_shape
from linspec.drafters.confident import ConfidentTree, exp_share
from linspec.drafters.eagle_net import BOTH, EagleNet
from linspec.kernels.cpu.fusion import FusionPlan, Piece
from linspec.kernels.cpu.grow import Fresh, GrowCall, Grown, Seed
from linspec.kernels.step_plan import NewNodes
from linspec.models.native_linear import NativeLinear
from linspec.models.one_call import OneCall
from linspec.state.sequence_states import SequenceStates


@dataclass(frozen=True, slots=True)
class Asked:
    """A tree that is asked for.

    tokens, pieces: of the entries that the cache of `slot` lacks, with the target's states of them. They are
    committed there. nodes, depth: of the largest tree behind `root`.
    """

    slot: int
    root: int
    tokens: Sequence[int]
    pieces: Sequence[Piece]
    nodes: int
    depth: int


@dataclass(frozen=True, slots=True)
class _End:
    """What the newest entry of a slot says: the state that a draft goes on from [D], the likeliest tokens and
    the logarithms of their shares."""

    state: torch.Tensor
    tokens: list[int]
    shares: list[float]


class TreesByLevel:
    """A step of the layer for the entries that are lacking, and one for each level of all trees."""

    def __init__(self, net: EagleNet, state: SequenceStates, top: int) -> None:
        self.net, self.state, self.top = net, state, top
        self._ends: dict[int, _End] = {}

    def grow(self, asked: Sequence[Asked]) -> list[TokenTree]:
        """A tree for each, in the order of their slots."""
        self._catch_up([each for each in asked if each.tokens])
        growing = [_Growing(each, self._ends[each.slot], self.top) for each in asked]
        try:
            while level := [(each, given) for each in growing if (given := each.ask()) is not None]:
                self._answer(level)
        finally:
            for each in asked:
                self.state.drop(each.slot)
        return [each.tree.tree() for each in growing]

    def _catch_up(self, asked: Sequence[Asked]) -> None:
        """Make the entries of what the target has committed."""
        if not asked:
            return
        inputs = [self._entries(each) for each in asked]
        output = self.net.decoder.step(inputs, self.state, want=BOTH)
        last = torch.tensor([nodes.stop - 1 for nodes in output.nodes])
        states = self.net.fed_back(output.hidden, output.layers[0][last])
        for given, state, top in zip(inputs, states, self._tops(output), strict=True):
            self.state.commit(given.slot, range(len(given.tokens)))
            self._ends[given.slot] = _End(state, *top)

    def _entries(self, asked: Asked) -> StepInput:
        states = torch.cat([torch.cat(tuple(piece), -1) for piece in asked.pieces])
        fused = self.net.fused(states.to(self.net.decoder.dtype))
        return StepInput(asked.slot, asked.tokens, all_logits=False, embeddings=fused)

    def _tops(self, output: StepOutput) -> list[tuple[list[int], list[float]]]:
        """The likeliest tokens behind each output of a step, with the logarithms of their shares."""
        best = output.logits.float().log_softmax(-1).topk(self.top)
        tokens = self.net.drafted.long()[best.indices]
        return list(zip(tokens.tolist(), best.values.tolist(), strict=True))

    def _answer(self, level: Sequence[tuple[_Growing, StepInput]]) -> None:
        """Children for the nodes of a level of all trees."""
        output = self.net.decoder.step([given for _, given in level], self.state, want=BOTH)
        states = self.net.fed_back(output.hidden, output.layers[0])
        tops = self._tops(output)
        for (each, _), part in zip(level, output.slices, strict=True):
            each.answer(states[part], tops[part])


class _Growing:
    """A tree in the making, and where its nodes stand in the cache."""

    def __init__(self, asked: Asked, end: _End, top: int) -> None:
        self.slot = asked.slot
        self.tree = ConfidentTree(asked.root, Budget(asked.nodes, asked.depth), top)
        self.tree.add(-1, end.tokens, end.shares)
        # of each node that was asked about its place in the cache; of all nodes the state they go on from
        self._staged: dict[int, int] = {-1: -1}
        self._states = [end.state] * len(end.tokens)
        self._parents = [-1] * len(end.tokens)
        self._level: list[int] = []

    def ask(self) -> StepInput | None:
        """The nodes of the next level; None at the end."""
        self._level = self.tree.next_level()
        if not self._level:
            return None
        tokens = [self.tree.tokens[node] for node in self._level]
        parents = [self._staged[self._parents[node]] for node in self._level]
        states = torch.stack([self._states[node] for node in self._level])
        for node in self._level:
            self._staged[node] = len(self._staged) - 1
        return StepInput(self.slot, tokens, parents, embeddings=states)

    def answer(self, states: torch.Tensor, tops: Sequence[tuple[list[int], list[float]]]) -> None:
        """The children of the nodes that were asked about."""
        for node, state, (tokens, shares) in zip(self._level, states, tops, strict=True):
            self.tree.add(node, tokens, shares)
            self._states += [state] * len(tokens)
            self._parents += [node] * len(tokens)


class TreesInOneCall:
    """The same in one call, entries and levels."""

    def __init__(self, net: EagleNet, state: SequenceStates, top: int, native: OneCall) -> None:
        self.state, self._native = state, native
        ids, normed = net.drafted.tolist(), net.config.normed
        self._call = GrowCall(_fusion_plan(net), ids, top, normed, state.slots)

    def grow(self, asked: Sequence[Asked]) -> list[TokenTree]:
        """A tree for each, in the order of their slots."""
        if not asked:
            return []
        fresh = [Fresh(self._entries(each), each.pieces) for each in asked if each.tokens]
        seeds = [self._seed(each) for each in asked]
        self._native.place(self.state)
        grown = self._call.trees(self._native.kernel, fresh, seeds)
        for each in asked:
            self.state.commit(each.slot, range(len(each.tokens)))
        return [_finished(each.root, tree) for each, tree in zip(asked, grown, strict=True)]

    def _entries(self, asked: Asked) -> NewNodes:
        """Entries that are committed once they are made; there is room for them."""
        slot, shape, length = (
            asked.slot,
            chain_shape(len(asked.tokens)),
            self.state.length(asked.slot),
        )
        self.state.reserve(slot, len(shape))
        self.state.record(slot, shape)
        positions = range(length, length + len(shape))
        return NewNodes(slot, asked.tokens, positions, shape, [length])

    def _seed(self, asked: Asked) -> Seed:
        self.state.reserve(asked.slot, MAX_STAGED)
        committed = self.state.length(asked.slot) + len(asked.tokens)
        return Seed(asked.slot, committed, asked.nodes, asked.depth)


def _finished(root: int, grown: Grown) -> TokenTree:
    shares = (exp_share(each) for each in grown.shares)
    return TokenTree((root, *grown.tokens), (-1, *grown.parents), confidences=(1.0, *shares))


def _fusion_plan(net: EagleNet) -> FusionPlan:
    norms = tuple(norm.get_parameter("weight").detach().float() for norm in net.norms)
    assert isinstance(net.fuse, NativeLinear), "it is made as the layers of the decoder are"
    return FusionPlan(norms, net.fuse.plan())


def make_trees(net: EagleNet, slots: int, top: int) -> TreesByLevel | TreesInOneCall:
    """In one call where the layer, which has its final form, runs in one."""
    native, state = net.decoder.native, net.decoder.new_state(slots)
    if (
        not isinstance(native, OneCall)
        or not state.in_kernels
        or not isinstance(net.fuse, NativeLinear)
    ):
        return TreesByLevel(net, state, top)
    return TreesInOneCall(net, state, top, native)
