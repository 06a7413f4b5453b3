"""Causal depthwise convolution over values: over a whole sequence, and for the nodes of a step.

Padded taps are [Hkv, rep, W + 1]: one more tap, of zero, for everything out of reach.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linspec.decoding.tree_mask import StagedTree, TreeMask
from linspec.mixers.ops.blocks import join, windows


def band(taps: torch.Tensor, block: int) -> torch.Tensor:
    """Causal convolution inside a block as a matrix: taps [H, W] -> [H, block, W - 1 + block].

    Column c stands for the value c - (W - 1) tokens after the start of the block.
    """
    count = taps.shape[1]
    row = torch.arange(block, device=taps.device)[:, None]
    column = torch.arange(count - 1 + block, device=taps.device)
    distance = row + count - 1 - column
    inside = (distance >= 0) & (distance < count)
    return F.pad(taps, (0, 1))[:, torch.where(inside, distance, count)]


def convolve(
    v: torch.Tensor,
    taps: torch.Tensor,
    repeats: int,
    conv_history: torch.Tensor | None,
    block: int = 64,
) -> torch.Tensor:
    """Causal depthwise convolution, one kernel per query head: [B, Hkv, T, V] -> [B, H, T, V].

    You et al. 2024 (arXiv 2406.07368), section 4.1: the taps on future tokens do not exist at all,
    so nothing can train them back in.
    """
    kernel = band(taps, block).unflatten(0, (-1, repeats)).flatten(1, 2)  # [Hkv, rep * block, .]
    o = kernel[:, None].to(v.dtype) @ windows(v, conv_history, taps.shape[1] - 1, block)
    return join(o, repeats, v.shape[2])


def convolve_both(v: torch.Tensor, taps: torch.Tensor, repeats: int) -> torch.Tensor:
    """Centred depthwise convolution, for encoders: taps [H, 2W - 1], the middle one on the token itself.

    The causal convolution of the values W - 1 tokens further on.
    """
    ahead = taps.shape[1] // 2
    shifted = F.pad(v, (0, 0, 0, ahead))
    return convolve(shifted, taps, repeats, None)[:, :, ahead:]


def tap_distances(
    offsets: torch.Tensor,
    columns: torch.Tensor,
    visible: torch.Tensor,
    taps: int,
    conv_history: int,
) -> torch.Tensor:
    """How many tokens back each value lies from each node: [R, N, conv_history + C]; `taps` if unseen.

    offsets [R, N], columns [R, C], visible [R, N, C]: see TreeMask. A node's window is itself and its
    nearest ancestors; past the root it reads committed values.
    """
    before = torch.arange(-conv_history, 0, device=columns.device).expand(len(columns), -1)
    columns = torch.cat((before, columns), dim=1)
    visible = F.pad(visible, (conv_history, 0), value=True)
    distance = offsets[:, :, None] - columns[:, None, :]
    return torch.where(visible & (distance >= 0), distance, taps).clamp(max=taps)


def convolve_reference(v: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """y_t = sum over j < W of c_j v_{t-j}: v [T, V], taps [W]."""
    out = []
    for t in range(len(v)):
        y = torch.zeros_like(v[0])
        for j, tap in enumerate(taps):
            if t - j >= 0:
                y = y + tap * v[t - j]
        out.append(y)
    return torch.stack(out)


def pad_taps(taps: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Taps [H, W] as padded taps [Hkv, rep, W + 1]."""
    return F.pad(taps, (0, 1)).view(kv_heads, taps.shape[0] // kv_heads, -1)


def convolve_nodes(
    values: torch.Tensor,
    tree_mask: TreeMask,
    padded: torch.Tensor,
    conv_history: int,
    *,
    final: bool,
) -> torch.Tensor:
    """The convolution for the nodes of a step: values [R, Hkv, W-1 + C, V] -> [R, Hkv, rep, N, V].

    final: the taps stay as they are, so what was made of them can be kept with a tree.
    """
    if tree_mask.tree is not None:
        # no node of a single slot reaches past the last W - 1 committed positions
        values = values[:, :, tree_mask.rows[0][0] :]
        weights = _tree_weights(tree_mask.tree, padded, conv_history, final=final)
    else:
        weights = _weights(padded, _distances(tree_mask, padded.shape[2] - 1, conv_history))
    o = weights.flatten(2, 3).to(values.dtype) @ values
    return o.unflatten(2, weights.shape[2:4])


def _distances(tree_mask: TreeMask, taps: int, conv_history: int) -> torch.Tensor:
    def build() -> torch.Tensor:
        return tap_distances(
            tree_mask.offsets, tree_mask.columns, tree_mask.visible, taps, conv_history
        )

    found: torch.Tensor = tree_mask.memo(("taps", taps, conv_history), build)
    return found


def _tree_weights(
    tree: StagedTree, padded: torch.Tensor, conv_history: int, *, final: bool
) -> torch.Tensor:
    """Weights for one slot, whose committed positions do not matter: kept with the tree."""
    count = padded.shape[2] - 1

    def distances() -> torch.Tensor:
        offsets = tree.depths[None, len(tree.depths) - len(tree.seen) :]
        return tap_distances(offsets, tree.depths[None], tree.seen[None], count, conv_history)

    found: torch.Tensor = tree.memo(("taps", count, conv_history), distances)
    if not final:
        return _weights(padded, found)
    # the taps stand beside their weights so that no other tensor can get their id
    kept = tree.memo(id(padded), lambda: (_weights(padded, found), padded))
    weights: torch.Tensor = kept[0]
    return weights


def _weights(padded: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """The convolution as weights over positions: [R, Hkv, rep, N, conv_history + C]."""
    return padded[:, :, distance].movedim(2, 0)
