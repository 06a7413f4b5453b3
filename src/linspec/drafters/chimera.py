"""Chimera (Zeng et al. 2024, arXiv 2402.15758): a small network reads the target's states and drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import FINAL, StepInput, Want
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree, root_only
from linspec.drafters.base import DRAFTERS, MAX_NODES, Drafter, DrafterContext
from linspec.drafters.chimera_net import TOKENS, ChimeraNet
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.guesses import GuessTree
from linspec.drafters.packed import draft_head
from linspec.drafters.saved import load_drafter, plain_files
from linspec.drafters.trained import check_calibrated
from linspec.kernels.cpu.library import load

# nodes of one depth that the network goes on from, and guesses behind each of them
_BEAM, _GUESSES = 6, 8


@dataclass(frozen=True, slots=True)
class ChimeraOptions:
    """Where the network is."""

    path: Path | None = path_option("the network", "chimera")


@dataclass(slots=True)
class _Read:
    """What the layer has read of a sequence: the states of so many tokens, the last of them [D]."""

    sequence: RunningSequence
    length: int
    last: torch.Tensor


@dataclass(slots=True)
class _Draft:
    """A tree that grows: for each node its token, parent, how likely the text goes through it, and its place
    among the nodes that the layer has staged, -1 where it has not seen it."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    reach: list[float] = field(default_factory=lambda: [1.0])
    staged: list[int] = field(default_factory=lambda: [-1])
    frontier: list[int] = field(default_factory=lambda: [0])

    def path(self, node: int) -> list[int]:
        """Tokens from the root to a node."""
        found = []
        while node >= 0:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]

    def grow(self, node: int, guesses: Sequence[int], chances: Sequence[float]) -> None:
        """Add what may follow a node."""
        for token, chance in zip(guesses, chances, strict=True):
            self.tokens.append(token)
            self.parents.append(node)
            self.reach.append(self.reach[node] * chance)
            self.staged.append(-1)

    def best(self, nodes: int) -> TokenTree:
        """The likeliest nodes, parents before their children."""
        order = sorted(range(1, len(self.tokens)), key=lambda node: -self.reach[node])[:nodes]
        kept = [0, *order]
        places = {node: place for place, node in enumerate(kept)}
        sure = [self.reach[n] / max(self.reach[self.parents[n]], 1e-30) for n in order]
        return TokenTree(
            tuple(self.tokens[node] for node in kept),
            (-1, *(places[self.parents[node]] for node in order)),
            confidences=(1.0, *(min(1.0, each) for each in sure)),
        )


@DRAFTERS.register(
    "chimera",
    summary="one layer over the target's last states and the newest tokens drafts a tree",
    paper="Zeng et al. 2024, arXiv 2402.15758",
    needs="a trained network: linspec train-drafter --kind chimera",
    options=ChimeraOptions,
)
class Chimera(Drafter):
    """Depth by depth, from the likeliest nodes so far; the budget keeps the likeliest of all.

    It reads states as they are committed. Where it was not asked for some rounds it begins anew with the
    newest ones: its layer sees no further than its window anyway.
    """

    confident = True

    files = plain_files(ChimeraNet)

    def __init__(self, net: ChimeraNet) -> None:
        check_calibrated(net.accuracies, net.kind)
        self.net = net.requires_grad_(False)
        net.layer.to_inference()
        self.trees = [
            GuessTree.of(net.accuracies[:depth], MAX_NODES)
            for depth in range(len(net.accuracies) + 1)
        ]
        self.max_nodes = MAX_NODES
        self.layer = net.target.config.layers - 1
        self.needs = Want((self.layer,))
        self._own: Target | None = None
        self._read: dict[int, _Read] = {}

    @classmethod
    def build(cls, context: DrafterContext, options: ChimeraOptions) -> Self:
        """With a network from disk."""
        target = context.decoder(cls.name)
        folder = find_drafter(cls.name, options.path, context)
        return cls(load_drafter(folder, target, ChimeraNet))

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def attached(self, target: Target) -> None:
        layer = self.net.layer
        self._own = Target(layer, layer.new_state(target.state.slots))
        self._read.clear()

    @property
    def own(self) -> Target:
        """The layer and what it remembers."""
        assert self._own is not None, "it drafts for no engine yet"
        return self._own

    @torch.inference_mode()
    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        known = [i for i, each in enumerate(sequences) if self.layer in each.hidden]
        trees = [root_only(sequence.root) for sequence in sequences]
        if not known:
            return trees
        self._catch_up([sequences[i] for i in known])
        drafts = {i: _Draft([sequences[i].root]) for i in known}
        depths = {i: min(self.net.config.depth, budgets[i].chain) for i in known}
        for depth in range(max(depths.values())):
            live = [i for i in known if depth < depths[i] and drafts[i].frontier]
            self._deeper([sequences[i] for i in live], [drafts[i] for i in live], depth)
        for i in known:
            trees[i] = drafts[i].best(budgets[i].nodes)
        return trees

    def _catch_up(self, sequences: Sequence[RunningSequence]) -> None:
        """Read the states that were committed since the last draft."""
        inputs = []
        for sequence in sequences:
            slot, hidden = sequence.slot, sequence.hidden[self.layer]
            read, length = self._read.get(slot), len(sequence.tokens) - 1
            self.own.state.drop(slot)
            if read is not None and read.sequence is sequence and read.length == length:
                continue
            rows = self.net.target.leave(hidden).to(self.net.layer.dtype)
            follows = read is not None and read.sequence is sequence
            if not follows or read is None or read.length != length - len(rows):
                self.own.state.reset(slot)
                rows = rows[-self.net.config.window :]
            self._read[slot] = _Read(sequence, length, rows[-1])
            given = StepInput(slot, (0,) * len(rows), all_logits=False, embeddings=rows)
            inputs.append(given)
        if inputs:
            self.own.step(inputs)
            for each in inputs:
                self.own.state.commit(each.slot, range(len(each.tokens)))

    def _deeper(
        self, sequences: Sequence[RunningSequence], drafts: Sequence[_Draft], depth: int
    ) -> None:
        """Let the layer see the frontier of every draft, and add what may follow it."""
        inputs = [self._frontier(*each) for each in zip(sequences, drafts, strict=True)]
        outputs = self.own.step(inputs)
        for sequence, draft, output in zip(sequences, drafts, outputs, strict=True):
            last = self._read[sequence.slot].last
            chances = self._scores(self.net.joined(last, output.hidden[FINAL], depth))
            best = chances.float().softmax(-1).topk(min(_GUESSES, chances.shape[-1]), dim=-1)
            tokens, first = self.net.tokens(best.indices).tolist(), len(draft.tokens)
            for node, *found in zip(draft.frontier, tokens, best.values.tolist(), strict=True):
                draft.grow(node, *found)
            new = range(first, len(draft.tokens))
            draft.frontier = sorted(new, key=lambda node: -draft.reach[node])[:_BEAM]

    def _frontier(self, sequence: RunningSequence, draft: _Draft) -> StepInput:
        staged = len(self.own.state.staged(sequence.slot))
        ids, parents = [], []
        for place, node in enumerate(draft.frontier, staged):
            newest = [*sequence.tokens[-TOKENS:-1], *draft.path(node)][-TOKENS:]
            ids.append(newest[:1] * (TOKENS - len(newest)) + newest)
            parent = draft.parents[node]
            parents.append(draft.staged[parent] if parent >= 0 else -1)
            draft.staged[node] = place
        features = self.net.features(torch.tensor(ids, device=self.net.target.device))
        return StepInput(sequence.slot, (0,) * len(ids), parents, embeddings=features)

    def _scores(self, joined: torch.Tensor) -> torch.Tensor:
        head = self.net.target.head if self.net.drafted is None else self._few
        found: torch.Tensor = head(joined)
        return found

    @cached_property
    def _few(self) -> torch.nn.Module:
        """The output layer of the tokens that are drafted, in 8 bits where kernels multiply by these."""
        head, drafted = self.net.target.head, self.net.drafted
        assert drafted is not None
        if load().library is not None and self.net.target.device.type == "cpu":
            return draft_head(head, drafted)
        return _Rows(head.weight[drafted.long()])

    def expected(self, budget: Budget) -> float:
        tree = self.trees[min(budget.depth, len(self.trees) - 1)]
        return tree.gains[min(budget.nodes, len(tree.gains) - 1)]

    def finished(self, sequence: RunningSequence) -> None:
        self._read.pop(sequence.slot, None)


class _Rows(torch.nn.Module):
    """A linear layer of some rows of another one."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)
