"""Token trees as kernels on a device read them: the path of each new node, from the tables of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# staged nodes of a slot: bits of one number
STAGED = 64


@dataclass(frozen=True, slots=True, eq=False)
class TreePaths:
    """nodes [R, N, 64] int32: the staged nodes on the path of each new node, the root first and itself last,
    then -1. depths [R, N] int32: how many lie before it."""

    nodes: torch.Tensor
    depths: torch.Tensor


def tree_paths(ancestors: torch.Tensor, depths: torch.Tensor, new_nodes: torch.Tensor) -> TreePaths:
    """Paths of `new_nodes` [R, N] from the bits and depths of all staged nodes [R, 64]: see `StepTables`.

    Nothing waits for the device. One call a step serves every layer.
    """
    bits, places = ancestors.gather(1, new_nodes), torch.arange(STAGED, device=ancestors.device)
    on_path = (bits[:, :, None] >> places) & 1 == 1  # [R, N, 64]
    # what is off the path goes to a column of its own
    at = torch.where(on_path, depths[:, None], STAGED)
    nodes = at.new_full((*at.shape[:2], STAGED + 1), -1)
    nodes.scatter_(2, at, places.expand_as(at))
    found = nodes[:, :, :STAGED].to(torch.int32).contiguous()
    return TreePaths(found, depths.gather(1, new_nodes).to(torch.int32))
