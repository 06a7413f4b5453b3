"""EAGLE-3-style drafts (Li et al. 2025, arXiv 2503.01840): one layer on the target's hidden states.

The drafter has a cache of its own, with one entry for each committed position but the last: entry t pairs
the target's states at t with token t + 1. Entries of drafts are dropped when a round has its tree; those of
accepted tokens are made again from the target's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Self

import torch

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import MAX_STAGED, StepInput, StepOutput, Want
from linspec.decoding.tree import Budget, TokenTree, best_first, root_only
from linspec.drafters.base import DRAFTERS, MAX_NODES, Drafter, DrafterContext
from linspec.drafters.confident import ConfidentTree, exp_share
from linspec.drafters.eagle_net import BOTH, EagleNet
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.saved_packed import EAGLE
from linspec.drafters.trained import Files
from linspec.errors import DrafterError
from linspec.kernels.cpu.grow import GrowCall, Grown, Seed
from linspec.kernels.selector import pick_kernel
from linspec.models.linear import Quantizer, fused_linear, integer_bits
from linspec.models.native_linear import NativeLinear
from linspec.utils.options import option
from linspec.utils.sizes import check_sizes


@dataclass(frozen=True, slots=True)
class EagleOptions:
    """Where the drafter is, and how wide and deep its trees may be."""

    path: Path | None = path_option("the drafter", "eagle")
    top: int = option("children of a node, and nodes of a level that get children", default=4)
    depth: int = option("depth of a tree", default=6)

    def __post_init__(self) -> None:
        check_sizes(self, "top depth")
        if self.top * (self.depth - 1) > MAX_NODES:
            raise DrafterError(
                f"{self.top} nodes of each of {self.depth} levels are more than the {MAX_NODES} that a draft "
                "can look at; use a smaller top or depth"
            )


# entries in a cache that nobody knows
LOST = -1


@dataclass(slots=True)
class _Record:
    """What is kept of the sequence in a slot.

    read: entries in the cache. unread: states of the target [P, layers · D] that are in no entry yet,
    each with the position that it begins at. end: what the newest entry says: the state that a draft goes on
    from [D], the likeliest tokens and the logarithms of their shares.
    """

    read: int = 0
    unread: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    end: tuple[torch.Tensor, list[int], list[float]] | None = None


@DRAFTERS.register(
    "eagle",
    summary="one trained layer goes on from the hidden states of the target; the tree grows where it is sure",
    paper="Li et al. 2025, arXiv 2503.01840; Li et al. 2024, arXiv 2406.16858",
    needs="a trained drafter: linspec train-drafter --kind eagle",
    options=EagleOptions,
)
class Eagle(Drafter):
    """Trees of the layer's likeliest tokens; see `ConfidentTree`."""

    confident = True

    files = Files(EAGLE.load, EAGLE.pack)

    def __init__(self, net: EagleNet, slots: int, options: EagleOptions | None = None) -> None:
        self.net, self.options = net, options or EagleOptions()
        if not net.accuracies:
            raise DrafterError(
                "this drafter was never measured, so nobody knows what its drafts are worth; train it with "
                "linspec train-drafter"
            )
        self.needs = Want(net.config.reads)
        self.top = min(self.options.top, net.config.vocabulary)
        self.max_nodes = MAX_NODES
        self._slots = slots
        self._records: dict[int, _Record] = {}
        self._gains: dict[int, list[float]] = {}
        self._ids = net.drafted.tolist()
        self._call: GrowCall | None = None

    @classmethod
    def build(cls, context: DrafterContext, options: EagleOptions) -> Self:
        """With a drafter from disk."""
        target = context.decoder(cls.name)
        folder = find_drafter(cls.name, options.path, context)
        return cls(EAGLE.load(folder, target), context.slots, options)

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    # ---- what is worth how much

    def expected(self, budget: Budget) -> float:
        depth = min(budget.depth, self.options.depth, len(self.net.accuracies))
        if depth not in self._gains:
            rates = [row[: self.top] for row in self.net.accuracies[:depth]]
            paths = best_first(rates, self.max_nodes)
            each = (prod(rates[at][rank] for at, rank in enumerate(path)) for path in paths)
            self._gains[depth] = list(accumulate(each, initial=0.0))
        gains = self._gains[depth]
        return gains[min(budget.nodes, len(gains) - 1)]

    # ---- the cache

    def started(self, sequence: RunningSequence) -> None:
        self._prepare()
        self.state.reset(sequence.slot)
        self._records[sequence.slot] = _Record()

    def finished(self, sequence: RunningSequence) -> None:
        self._records.pop(sequence.slot, None)

    def paused(self, sequence: RunningSequence) -> Any:
        """The entries: the target's states that they were made of are not handed out again."""
        copy = self.state.snapshot(sequence.slot)
        return self._records.pop(sequence.slot, _Record()), copy

    def resumed(self, sequence: RunningSequence, kept: Any) -> None:
        self._records[sequence.slot], copy = kept
        self.state.restore(sequence.slot, copy)

    def passed(self, sequence: RunningSequence) -> None:
        record = self._records.get(sequence.slot)
        if record is not None and (new := self._unread(sequence, record)):
            record.unread = new

    def _prepare(self) -> None:
        """The form that drafts, once the target has its own."""
        if not hasattr(self, "state"):
            self.net = drafting_form(self.net)
            self.state = self.net.decoder.new_state(self._slots)
            native = self.net.decoder.native
            if native is not None and self.state.in_kernels:
                normed = self.net.config.normed
                self._call = GrowCall(self._ids, self.top, normed)

    def _unread(self, sequence: RunningSequence, record: _Record) -> list[tuple[int, torch.Tensor]]:
        """The target's states that were handed out and are in no entry, a piece behind the other."""
        found = list(record.unread)
        layers = [sequence.hidden.get(layer) for layer in self.net.config.reads]
        given = [states for states in layers if states is not None]
        if len(given) < len(layers):
            return found
        end = len(sequence.tokens) - 1
        first, known = (
            end - len(given[0]),
            found[-1][0] + len(found[-1][1]) if found else record.read,
        )
        if first <= known < end:
            found.append((known, torch.cat(given, -1)[known - first :]))
        return found

    def _catch_up(self, sequences: Sequence[RunningSequence]) -> None:
        """Make the entries of all positions that the target has committed."""
        self._prepare()
        inputs, news = [], []
        for sequence in sequences:
            record = self._records.setdefault(sequence.slot, _Record())
            self.state.drop(sequence.slot)
            record.unread = self._unread(sequence, record)
            if record.unread:
                states = torch.cat([states for _, states in record.unread])
                tokens = sequence.tokens[record.read + 1 : record.read + 1 + len(states)]
                fused = self.net.fused(states.to(self.net.decoder.dtype))
                inputs.append(StepInput(sequence.slot, tokens, all_logits=False, embeddings=fused))
                news.append(record)
        if not inputs:
            return
        output = self.net.decoder.step(inputs, self.state, want=BOTH)
        ends = torch.tensor([nodes.stop - 1 for nodes in output.nodes])
        states = self.net.fed_back(output.hidden, output.layers[0][ends])
        tops = self._tops(output)
        for given, record, state, top in zip(inputs, news, states, tops, strict=True):
            # what raises half-way leaves a cache that is right for no draft
            read, record.read, record.unread = record.read, LOST, []
            self.state.commit(given.slot, range(len(given.tokens)))
            record.read = read + len(given.tokens)
            record.end = (state, *top)

    def _tops(self, output: StepOutput) -> list[tuple[list[int], list[float]]]:
        """The likeliest tokens behind each output of a step, with the logarithms of their shares."""
        best = output.logits.float().log_softmax(-1).topk(self.top)
        tokens = self.net.drafted.long()[best.indices]
        return list(zip(tokens.tolist(), best.values.tolist(), strict=True))

    # ---- drafts

    @torch.inference_mode()
    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].slot)
        self._catch_up([sequences[i] for i in order])
        seeds: dict[int, Seed] = {}
        for i in order:
            slot, record = sequences[i].slot, self._records[sequences[i].slot]
            # the engine may not have handed out the states of every position
            if record.end is None or record.read != len(sequences[i].tokens) - 1:
                continue
            within = budgets[i].within(self.max_nodes, self.options.depth)
            seeds[i] = Seed(slot, record.read, within.nodes, within.depth, *record.end)
        roots = [sequences[i].root for i in seeds]
        trees = dict(zip(seeds, self._trees(list(seeds.values()), roots), strict=True))
        return [trees.get(i) or root_only(each.root) for i, each in enumerate(sequences)]

    def _trees(self, seeds: Sequence[Seed], roots: Sequence[int]) -> list[TokenTree]:
        """The tree of each seed behind its root, in one call where there is one."""
        if not seeds:
            return []
        if self._call is not None:
            for seed in seeds:
                self.state.reserve(seed.slot, MAX_STAGED)
            native = self.net.decoder.native
            assert native is not None
            native.place(self.state)
            return list(map(_finished, roots, self._call.trees(native.kernel, seeds)))
        growing = [_Growing(*each, self.top) for each in zip(seeds, roots, strict=True)]
        try:
            self._grow(growing)
        finally:
            for seed in seeds:
                self.state.drop(seed.slot)
        return [each.tree.tree() for each in growing]

    def _grow(self, growing: Sequence[_Growing]) -> None:
        """Ask about level after level of all trees, each in one step."""
        while True:
            asked = [(each, given) for each in growing if (given := each.ask()) is not None]
            if not asked:
                return
            output = self.net.decoder.step([given for _, given in asked], self.state, want=BOTH)
            states = self.net.fed_back(output.hidden, output.layers[0])
            tops = self._tops(output)
            for (each, _), part in zip(asked, output.slices, strict=True):
                each.answer(states[part], tops[part])


def _finished(root: int, grown: Grown) -> TokenTree:
    shares = (exp_share(each) for each in grown.shares)
    return TokenTree((root, *grown.tokens), (-1, *grown.parents), confidences=(1.0, *shares))


class _Growing:
    """A tree in the making, and where its nodes stand in the cache."""

    def __init__(self, seed: Seed, root: int, top: int) -> None:
        self.slot = seed.slot
        self.tree = ConfidentTree(root, Budget(seed.nodes, seed.depth), top)
        self.tree.add(-1, seed.tokens, seed.shares)
        state, tokens = seed.state, seed.tokens
        # of each node that was asked about its place in the cache; of all nodes the state they go on from
        self._staged: dict[int, int] = {-1: -1}
        self._states = [state] * len(tokens)
        self._parents = [-1] * len(tokens)
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


def drafting_form(net: EagleNet) -> EagleNet:
    """The form that suits the target, in place: 8-bit weights where linspec has kernels of its own.

    A draft is judged by its target, so rounding costs acceptance at most.
    """
    head: torch.nn.Module = net.target.head
    natively = isinstance(head, NativeLinear) or (
        isinstance(head, torch.nn.Linear) and pick_kernel(head.weight).own
    )
    return net.ready(Quantizer(integer_bits(head) or 8, {}) if natively else fused_linear)
