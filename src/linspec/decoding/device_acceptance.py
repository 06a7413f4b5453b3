"""Which nodes of trees are accepted, for all slots of a step at once, by operations on tensors alone.

The rule is the walk of `verifiers.base`: go down from the root while a child carries the token that the
target has for its parent, the first of several such children. Here every node says whether it is that child,
and is accepted if all nodes on its path are. Nothing waits for the device, so a CUDA graph can hold it.

    chosen, finite = chosen_tokens(logits, tables, drawn=False)     # [R, N], [R]
    found = accept(tables, chosen)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linspec.decoding.likeliest import likeliest_on_device
from linspec.decoding.static_mask import StepTables


@dataclass(frozen=True, slots=True, eq=False)
class AcceptedPaths:
    """deepest [R]: the last accepted node. lengths [R]: how many are accepted, the root included. tokens [R]:
    the target's token behind them. rows [R, N]: the accepted nodes from the root down, behind them every
    node's own number; that alone for a slot that is not judged."""

    deepest: torch.Tensor
    lengths: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor

    def of_path(self, nodes: torch.Tensor) -> torch.Tensor:
        """What the `rows` have of nodes [R, N, D]."""
        return nodes.gather(1, self.rows[:, :, None].expand_as(nodes))

    def of_deepest(self, nodes: torch.Tensor) -> torch.Tensor:
        """What the last accepted node has of nodes [R, N, D]: [R, D]."""
        return nodes.gather(1, self.deepest[:, None, None].expand(-1, 1, nodes.shape[2]))[:, 0]


def chosen_tokens(
    logits: torch.Tensor, tables: StepTables, *, drawn: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's token behind each node [R, N], by scores [R, N, V]; whether those of a slot are sound [R].

    The likeliest, as `likeliest` has it; drawn: where the temperature of a slot is above 0, the one that its
    number of that depth draws, as `Sampler.probabilities` and `Sampler.draw` do.
    """
    best, scores = likeliest_on_device(logits)
    finite = scores.isfinite().all(1)
    if not drawn:
        return best, finite
    hot = tables.temperatures > 0
    return torch.where(hot[:, None], _drawn(logits, scores, tables, hot), best), finite


def _drawn(
    logits: torch.Tensor, greatest: torch.Tensor, tables: StepTables, hot: torch.Tensor
) -> torch.Tensor:
    temperatures = torch.where(hot, tables.temperatures, 1.0).float()[:, None, None]
    # the likeliest score becomes 0, so that no temperature overflows it
    scores = (logits.float() - greatest.float()[:, :, None]) / temperatures
    cumulative = scores.softmax(-1).double().cumsum(-1)
    depths = tables.depths.gather(1, tables.nodes)
    points = tables.numbers.gather(1, depths) * cumulative[:, :, -1]
    found = torch.searchsorted(cumulative, points[:, :, None], right=True)[:, :, 0]
    # what NaN makes of it is never used, but has to be a token
    return found.clamp(max=logits.shape[-1] - 1)


def accept(tables: StepTables, chosen: torch.Tensor) -> AcceptedPaths:
    """The accepted paths of the trees of a step, by the target's tokens [R, N]."""
    tokens, bits, depths = tables.tokens, tables.tree_ancestors, tables.tree_depths
    own = torch.arange(tables.columns, device=bits.device)
    on_path = (bits[:, :, None] >> own) & 1 == 1  # [R, N, N]: the second is the first or before it
    # the last node before a node is its parent; none stands before the root
    parents = torch.where(on_path & (own != own[:, None]), own, -1).amax(2)
    twin = (parents[:, :, None] == parents[:, None]) & (tokens[:, :, None] == tokens[:, None])
    later = (twin & (own < own[:, None])).any(2)
    follows = tokens == chosen.gather(1, parents.clamp(min=0))
    right = (own == 0) | (follows & ~later)
    # a node that a slot has not has no bits
    taken = (bits != 0) & ~(on_path & ~right[:, None]).any(2)
    deepest = torch.where(taken, own, 0).amax(1)
    behind = chosen.gather(1, deepest[:, None])[:, 0]
    return AcceptedPaths(deepest, taken.sum(1), behind, _rows(taken, depths, own))


def _rows(taken: torch.Tensor, depths: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[R, N]: at each depth of the path the node that is `taken` there, and behind it each column's own."""
    columns = len(own)
    rows = torch.arange(columns + 1, device=own.device).repeat(len(taken), 1)
    # what is not taken goes to a column of its own
    rows.scatter_(1, torch.where(taken, depths, columns), own.expand_as(depths))
    return rows[:, :columns]


def next_round(
    tables: StepTables, accepted: AcceptedPaths, follow: torch.Tensor | None
) -> torch.Tensor:
    """What `StepTables.put` takes for the trees of the next round, which are of the same shapes.

    The accepted nodes stay staged, one behind the other, and the next tree hangs on the last of them. Its
    tokens are found by `regrow`: follow [R, G] stands behind the token that was decided.
    """
    lengths = accepted.lengths[:, None]
    nodes, found = tables.nodes + lengths, accepted.tokens[:, None]
    if follow is not None:
        found = torch.cat((found, follow), 1)
    # nodes that were staged before the next tree: the chain of all rounds so far
    before = nodes[:, :1]
    number = torch.arange(tables.depths.shape[1], device=nodes.device)
    in_tree = number - before
    inside = (in_tree >= 0) & (in_tree < tables.columns)
    at = in_tree.clamp(0, tables.columns - 1)
    depths = torch.where(inside, tables.tree_depths.gather(1, at) + before, number)
    # bits of a node in a chain: its own and all lower ones
    chain = ~(-2 << number)
    bits = tables.tree_ancestors.gather(1, at)
    below = torch.where(bits != 0, (bits << before) | chain[before - 1], 0)
    ancestors = torch.where(in_tree < 0, chain, torch.where(inside, below, 0))
    return tables.changed(
        tokens=found.gather(1, tables.regrow),
        positions=tables.positions + lengths,
        nodes=nodes,
        depths=depths,
        ancestors=ancestors,
    )
