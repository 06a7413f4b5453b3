"""EAGLE-3-style drafts (Li et al. 2025, arXiv 2503.01840): one layer on the target's hidden states.

The drafter has a cache of its own, with one entry for each committed position but the last: entry t pairs
the target's states at t with token t + 1. Entries of drafts are dropped when a round has its tree; those of
accepted tokens are made again from the target's states, when the next draft is asked for. Where that is late,
or a prompt is long, the cache begins anew with the newest positions: what lies further back hardly matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Self

import torch

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import MAX_STAGED, Want
from linspec.decoding.tree import Budget, TokenTree, best_first, root_only
from linspec.drafters.base import DRAFTERS, MAX_NODES, Drafter, DrafterContext
from linspec.drafters.eagle_net import EagleNet
from linspec.drafters.eagle_trees import Asked, TreesByLevel, TreesInOneCall, make_trees
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.held import HeldStates, newest, positions_in
from linspec.drafters.saved_packed import EAGLE
from linspec.drafters.trained import Files
from linspec.errors import DrafterError
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
    history: int = option(
        "newest positions that it reads where it has not drafted for longer, and of a prompt",
        default=32,
    )

    def __post_init__(self) -> None:
        check_sizes(self, "top depth history")
        if self.history > MAX_STAGED:
            raise DrafterError(f"history must be {MAX_STAGED} at most, got {self.history}")
        if self.top * (self.depth - 1) > MAX_NODES:
            raise DrafterError(
                f"{self.top} nodes of each of {self.depth} levels are more than the {MAX_NODES} that a draft "
                "can look at; use a smaller top or depth"
            )


# entries in a cache that nobody knows
LOST = -1


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
        # by slot: positions whose states were read
        self._read: dict[int, int] = {}
        self._held = HeldStates(net.config.reads, self.options.history)
        self._gains: dict[int, list[float]] = {}

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
        self._held.forget(sequence.slot)
        self._read[sequence.slot] = LOST

    def finished(self, sequence: RunningSequence) -> None:
        self._held.forget(sequence.slot)
        self._read.pop(sequence.slot, None)

    def passed(self, sequence: RunningSequence) -> None:
        self._held.keep(sequence)

    @cached_property
    def trees(self) -> TreesByLevel | TreesInOneCall:
        """What drafts, made once the target has its final form."""
        self.net = drafting_form(self.net)
        return make_trees(self.net, self._slots, self.top)

    def _asked(self, sequence: RunningSequence, budget: Budget) -> Asked | None:
        """A tree behind all that the target has committed; None where its newest states are not there."""
        slot, end = sequence.slot, len(sequence.tokens) - 1
        pieces, known = self._held.take(sequence), self._read.get(slot, LOST)
        there = positions_in(pieces)
        self.trees.state.drop(slot)
        if known == LOST or end - known > there:
            # the cache begins anew, with a shorter text
            self.trees.state.reset(slot)
            known = end - there
        pieces = newest(pieces, end - known)
        if not self.trees.state.length(slot) and not pieces:
            return None
        tokens = sequence.tokens[known + 1 : end + 1]
        within = budget.within(self.max_nodes, self.options.depth)
        return Asked(slot, sequence.root, tokens, pieces, within.nodes, within.depth)

    # ---- drafts

    @torch.inference_mode()
    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        asked: dict[int, Asked] = {}
        for i in sorted(range(len(sequences)), key=lambda i: sequences[i].slot):
            each = self._asked(sequences[i], budgets[i])
            # what raises half-way leaves a cache that is right for no draft
            self._read[sequences[i].slot] = LOST
            if each is not None:
                asked[i] = each
        trees = dict(zip(asked, self.trees.grow(list(asked.values())), strict=True))
        for i in asked:
            self._read[sequences[i].slot] = len(sequences[i].tokens) - 1
            self._held.forget(sequences[i].slot)
        return [trees.get(i) or root_only(each.root) for i, each in enumerate(sequences)]


def drafting_form(net: EagleNet) -> EagleNet:
    """The form that suits the target, in place: 8-bit weights where linspec has kernels of its own.

    A draft is judged by its target, so rounding costs acceptance at most.
    """
    head: torch.nn.Module = net.target.head
    natively = isinstance(head, NativeLinear) or (
        isinstance(head, torch.nn.Linear) and pick_kernel(head.weight).own
    )
    return net.ready(Quantizer(integer_bits(head) or 8, {}) if natively else fused_linear)
