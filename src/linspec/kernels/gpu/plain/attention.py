"""Attention of the nodes of token trees over a contiguous cache: see `triton/attention.py`."""

from __future__ import annotations

import torch

from linspec.decoding.tree_paths import TreePaths
from linspec.kernels.gpu.plain.recurrence import mapped
from linspec.kernels.gpu.reach import Reach
from linspec.kernels.gpu.reads import check_weights


def tree_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    held: torch.Tensor,
    paths: TreePaths,
    *,
    scale: float,
    cap: float = 0.0,
    weights: str = "softmax",
    unit: bool = False,
    reach: Reach = Reach(),
    bases: torch.Tensor | None = None,
    sinks: int = 0,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """As the kernel, in torch, with sums in the dtype of the inputs."""
    rows = rows_on_paths(held, paths, keys.shape[2])  # [R, N, C]: where on the path, or -1
    check_weights(weights)
    first = held.new_zeros(len(held)) if bases is None else bases
    own = (first + held)[:, None] + paths.depths
    there, positions = rows >= 0, first[:, None, None] + rows
    seen = there & ((positions >= reach.oldest(own)[..., None]) | (positions < sinks))
    k, v = keys[slots].to(q.dtype), values[slots].to(q.dtype)
    if kept is not None:
        # they are no rows of the buffer once this begins behind them
        gone = (first > 0)[:, None, None].expand(*seen.shape[:2], sinks)
        there, seen = torch.cat((gone, there), dim=-1), torch.cat((gone, seen), dim=-1)
        old_k, old_v = kept[slots].to(q.dtype).unbind(2)
        k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
    seen = seen[:, None, None]
    if unit:
        q, k = mapped(q, "unit"), mapped(k, "unit")
    scores = torch.einsum("rgbnk,rgck->rgbnc", q, k) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if weights == "softmax":
        share = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    else:
        share = scores.relu().square() if weights == "relu2" else scores
        share = share.masked_fill(~seen, 0.0)
    # what is not seen may hold anything
    v = v.masked_fill(~there.any(1)[:, None, :, None], 0.0)
    return torch.einsum("rgbnc,rgcv->rgbnv", share, v)


def rows_on_paths(held: torch.Tensor, paths: TreePaths, capacity: int) -> torch.Tensor:
    """[R, N, C]: which row of a node's path each row of the buffer is, -1 if it is none of it."""
    at = torch.arange(capacity, device=held.device)
    found = torch.where(at < held[:, None], at, -1)[:, None].repeat(1, paths.nodes.shape[1], 1)
    steps = torch.arange(paths.nodes.shape[2], device=held.device)
    on_path = paths.nodes >= 0
    # nodes off the path write -1 into the last column, which is cut off again
    to = torch.where(on_path, held[:, None, None] + paths.nodes, capacity)
    place = torch.where(on_path, held[:, None, None] + steps, -1)
    wide = torch.nn.functional.pad(found, (0, 1), value=-1)
    return wide.scatter(2, to, place)[:, :, :capacity]
