"""Block drafting (DFlash, arXiv 2602.06036; DSpark, 2607.05147): a chain from one small forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import Want
from linspec.decoding.tree import Budget, TokenTree, chain_shape, root_only
from linspec.drafters.base import DRAFTERS, Drafter, DrafterContext
from linspec.drafters.block_cache import Asked, BlockCache, draft
from linspec.drafters.block_net import BlockNet
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.held import HeldStates
from linspec.drafters.medusa import runs_natively
from linspec.drafters.packed_block import PackedBlockNet
from linspec.drafters.saved_packed import BLOCK
from linspec.drafters.trained import Files
from linspec.errors import DrafterError
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer, integer_bits


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """Where the drafter is."""

    path: Path | None = path_option("the drafter", "block")


@DRAFTERS.register(
    "block",
    summary="a small decoder drafts a block in one pass; its confidences say how much is verified",
    paper="Chen et al. 2026, arXiv 2602.06036; DeepSeek-AI 2026, arXiv 2607.05147",
    needs="a trained drafter: linspec train-drafter MODEL --kind block",
    options=BlockOptions,
)
class Block(Drafter):
    """Chains of the likeliest tokens, with a confidence for each.

    The whole block is drafted whatever the budget is, as it was trained; the tree is a prefix of it.
    """

    confident = True

    files = Files(BLOCK.load, BLOCK.pack)

    def __init__(self, net: BlockNet) -> None:
        if not net.measured.acceptance:
            raise DrafterError(
                "this block drafter was never measured, so nothing is known of what it brings; train it with "
                "linspec train-drafter"
            )
        self.net, self.max_nodes = net, net.config.places
        self.needs = Want(net.config.read)
        self._draft = net.draft if isinstance(net, PackedBlockNet) else partial(draft, net)
        self.cache = BlockCache(net.config, net.masks.device, net.masks.dtype)
        self._held = HeldStates(net.config.read, net.config.window)

    @classmethod
    def build(cls, context: DrafterContext, options: BlockOptions) -> Self:
        """With a drafter from disk."""
        target = context.decoder(cls.name)
        folder = find_drafter(cls.name, options.path, context)
        return cls(ready_net(folder, target))

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def started(self, sequence: RunningSequence) -> None:
        self._held.forget(sequence.slot)
        self.cache.forget(sequence.slot)

    def finished(self, sequence: RunningSequence) -> None:
        self._held.forget(sequence.slot)

    def passed(self, sequence: RunningSequence) -> None:
        self._held.keep(sequence)

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        known = [i for i, each in enumerate(sequences) if each.hidden]
        tokens, sure = self._draft(self.cache, [self._asked(sequences[i]) for i in known])
        trees = [root_only(each.root) for each in sequences]
        for i, chain, shares in zip(known, tokens, sure, strict=True):
            self._held.forget(sequences[i].slot)
            nodes = min(budgets[i].chain, self.max_nodes) + 1
            trees[i] = TokenTree(
                (sequences[i].root, *chain)[:nodes],
                chain_shape(nodes).parents,
                confidences=(1.0, *shares)[:nodes],
            )
        return trees

    def _asked(self, sequence: RunningSequence) -> Asked:
        position, pieces = len(sequence.tokens) - 1, self._held.take(sequence)
        return Asked(sequence.slot, sequence.number, sequence.root, position, pieces)

    def expected(self, budget: Budget) -> float:
        return self.net.measured.gains[min(budget.chain, self.max_nodes)]


def ready_net(folder: Path, target: Decoder) -> BlockNet:
    """The drafter in `folder` in the form that suits `target`, which may be prepared later."""
    net = BLOCK.load(folder, target)
    if not isinstance(net, PackedBlockNet) and runs_natively(target.head):
        return PackedBlockNet.of(net, Quantizer(integer_bits(target.head) or 8, {}))
    return net
