"""Linear states of the nodes of token trees, row by row: see `triton/recurrence.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.decoding.tree_paths import TreePaths
from linspec.kernels.gpu.fading import Fading

_NORM_FLOOR = 1e-6


def read_states(
    q: torch.Tensor,
    states: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    held: torch.Tensor,
    paths: TreePaths,
    fading: Fading,
) -> torch.Tensor:
    """As the kernel, in torch, with sums in the dtype of the states; one node after the other."""
    found = []
    for r, slot in enumerate(slots.tolist()):
        own = int(held[r])
        for node, path in enumerate(paths.nodes[r].tolist()):
            at = own + int(paths.depths[r, node])
            rows = [*range(own), *(own + each for each in path if each >= 0)]
            closed = at + 1
            if fading.group:
                closed = max(0, at // fading.group - (fading.span - 1)) * fading.group
            state = states[slot]
            for number, row in enumerate(rows):
                key, value = keys[slot, :, row], values[slot, :, row]
                state = advanced(state, key, value, fading, written=number < closed)
            found.append(mapped(q[r, :, :, node].to(state.dtype), fading.map) @ state)
    return torch.stack(found).unflatten(0, (len(q), q.shape[3])).permute(0, 2, 3, 1, 4).to(q.dtype)


def fold_rows(
    states: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    fading: Fading,
) -> None:
    """As the kernel, in torch, with sums in the dtype of the states."""
    for slot, places, count in zip(slots.tolist(), rows.tolist(), counts.tolist(), strict=True):
        for row in places[:count]:
            key, value = keys[slot, :, row], values[slot, :, row]
            states[slot] = advanced(states[slot], key, value, fading, written=True)


def advanced(
    state: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fading: Fading, *, written: bool
) -> torch.Tensor:
    """The state [Hkv, K, V] after one more row, key [Hkv, K + E] and value [Hkv, V]."""
    wide, width = key.to(state.dtype), state.shape[1]
    if fading.gates:
        state = state * wide[:, width : width + fading.gates, None].exp()
    if not written:
        return state
    k, new = mapped(wide[:, :width], fading.map)[..., None], value.to(state.dtype)[:, None]
    if fading.delta:
        new = wide[:, -1:, None] * (new - (k * state).sum(1, keepdim=True))
    return state + k * new


def mapped(x: torch.Tensor, name: str) -> torch.Tensor:
    """φ over the last dimension."""
    if name == "unit":
        return F.normalize(x, dim=-1, eps=_NORM_FLOOR)
    if name == "elu_plus_1":
        return F.elu(x) + 1
    if name == "relu":
        return x.relu()
    return x.softmax(-1) if name == "softmax" else x
