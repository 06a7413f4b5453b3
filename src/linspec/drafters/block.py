"""Block drafting (DFlash, arXiv 2602.06036; DSpark, 2607.05147): a chain from one small forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Self

import torch

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import Want
from linspec.decoding.tree import Budget, TokenTree, chain_shape, root_only
from linspec.drafters.base import DRAFTERS, Drafter, DrafterContext
from linspec.drafters.block_cache import Asked, BlockCache
from linspec.drafters.block_net import BlockNet
from linspec.drafters.saved import load_drafter
from linspec.errors import DrafterError
from linspec.utils.options import option


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """Where the drafter is."""

    path: Path | None = option(
        "directory of the drafter; none is 'block' in the model's directory",
        default=None,
        short=True,
    )


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

    def __init__(self, net: BlockNet) -> None:
        if not net.measured.acceptance:
            raise DrafterError(
                "this block drafter was never measured, so nothing is known of what it brings; train it with "
                "linspec train-drafter"
            )
        self.net, self.max_nodes = net, net.config.places
        self.needs = Want(net.config.read)
        self.cache = BlockCache(net.config, net.masks.device, net.masks.dtype)
        self._gains = [0.0, *accumulate(accumulate(net.measured.acceptance, mul))]

    @classmethod
    def build(cls, context: DrafterContext, options: BlockOptions) -> Self:
        """With a drafter from disk."""
        target = context.decoder(cls.name)
        folder = options.path or (context.source / "block" if context.source else None)
        if folder is None or not folder.exists():
            raise DrafterError(
                f"no block drafter in {folder}; train one with `linspec train-drafter MODEL --kind block "
                "--out DIR` and name its directory: block:DIR"
            )
        return cls(load_drafter(folder, target, BlockNet))

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        known = [each for each in sequences if each.hidden]
        drafted = iter(
            zip(*draft(self.net, self.cache, [self._asked(each) for each in known]), strict=True)
        )
        trees = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            if not sequence.hidden:
                trees.append(root_only(sequence.root))
                continue
            tokens, sure = next(drafted)
            nodes = min(budget.chain, self.max_nodes) + 1
            trees.append(
                TokenTree(
                    (sequence.root, *tokens)[:nodes],
                    chain_shape(nodes).parents,
                    confidences=(1.0, *sure)[:nodes],
                )
            )
        return trees

    def _asked(self, sequence: RunningSequence) -> Asked:
        states = [sequence.hidden[layer] for layer in self.net.config.read]
        position = len(sequence.tokens) - 1
        return Asked(sequence.slot, sequence.number, sequence.root, position, states)

    def expected(self, budget: Budget) -> float:
        return self._gains[min(budget.chain, self.max_nodes)]


@torch.inference_mode()
def draft(
    net: BlockNet, cache: BlockCache, asked: Sequence[Asked]
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and confidences [S][B] for some sequences, whose context is kept up to their roots."""
    if not asked:
        return [], []
    for each in asked:
        fresh = [states.to(cache.newest) for states in cache.fresh(each)]
        if not len(fresh[0]):
            continue
        context = net.context(fresh)[None]
        positions = torch.arange(each.position - len(fresh[0]), each.position)[None]
        rows = net.rows(context, positions.to(context.device))
        kept = [(keys[0], values[0]) for keys, values in rows]
        cache.put(each.slot, kept, context[0, -1], each.position)
    slots = [each.slot for each in asked]
    context_rows, seen = cache.seen(slots)
    device = cache.newest.device
    roots = net.embedded(torch.tensor([each.root for each in asked], device=device))
    positions = torch.tensor([[each.position] for each in asked], device=device)
    newest = cache.newest[slots][:, None]
    found = net.blocks(newest, roots[:, None], positions, context_rows, seen[:, None])[:, 0]
    drafts, sure = net.walk(found, net.unary(found), roots)
    tokens: list[list[int]] = net.tokens(drafts).tolist()
    shares: list[list[float]] = net.confidences(sure.float()).tolist()
    return tokens, shares
