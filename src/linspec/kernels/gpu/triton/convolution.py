"""The causal convolution over values of the nodes of token trees, in Triton.

    o_t = sum_{j < W} c_j v_{t-j}

A node takes the W nearest values on its path one after the other, its own first: what it gets depends neither
on the tree around it nor on which of them are committed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from linspec.decoding.tree_paths import STAGED, TreePaths
from linspec.errors import ConfigError
from linspec.kernels.gpu.triton.arithmetic import UNFUSED
from linspec.kernels.gpu.triton.available import require


# one program for every number of nodes
@triton.jit(do_not_specialize=["count"])
def _convolve(
    values, taps, slots, held, nodes, depths, out, count, history, width,
    v_s, v_g, v_c, t_g, t_b,
    HEADS: tl.constexpr, REPEATS: tl.constexpr, RP: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """What the queries of one node and KV head get."""
    r, node, g = tl.program_id(0) // count, tl.program_id(0) % count, tl.program_id(1)
    repeat, value = tl.arange(0, RP), tl.arange(0, VP)
    slot, own = tl.load(slots + r).to(tl.int64), tl.load(held + r).to(tl.int32)
    depth = tl.load(depths + r * count + node)
    from_v, path = values + slot * v_s + g * v_g, nodes + (r * count + node) * STAGED
    sums = tl.zeros((RP, VP), tl.float32)
    for back in range(0, width):
        at = depth - back
        # ahead of the tree lie committed values, and those of the history
        lies = (own + at).to(tl.int64)
        if at >= 0:
            lies = (own + tl.load(path + at)).to(tl.int64)
        row = tl.load(from_v + (history + lies) * v_c + value, mask=value < V, other=0.0)
        tap = tl.load(taps + g * t_g + repeat * t_b + back, mask=repeat < REPEATS, other=0.0)
        sums += tap.to(tl.float32)[:, None] * row.to(tl.float32)[None, :]
    # [R, Hkv, rep, N, V]
    to = (((r * HEADS + g) * REPEATS + repeat) * count + node).to(tl.int64)[:, None] * V + value
    known = (repeat < REPEATS)[:, None] & (value < V)
    tl.store(out + to, sums.to(out.dtype.element_ty), mask=known)


def convolve_paths(
    values: torch.Tensor,
    taps: torch.Tensor,
    slots: torch.Tensor,
    held: torch.Tensor,
    paths: TreePaths,
    history: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The convolution for the nodes of a step: [R, Hkv, rep, N, V] in `dtype`, with sums in float32.

    values [slots, Hkv, history + C, V] have `history` >= W - 1 values ahead of the `held` [R] committed ones
    of `slots` [R], and the staged ones behind. taps [Hkv, rep, W]. Raises ConfigError for features that do
    not lie side by side, and where Triton cannot run.
    """
    require(values.device)
    if values.stride(-1) != 1 or taps.stride(-1) != 1:
        raise ConfigError(
            "convolve_paths takes values and taps that lie side by side; use contiguous()"
        )
    (heads, repeats, width), features = taps.shape, values.shape[3]
    rows, count = paths.depths.shape
    out = torch.empty(rows, heads, repeats, count, features, dtype=dtype, device=values.device)
    _convolve[(rows * count, heads)](
        *(values, taps, slots, held, paths.nodes, paths.depths, out, count, history, width),
        *(*values.stride()[:3], *taps.stride()[:2]),
        HEADS=heads,
        REPEATS=repeats,
        RP=triton.next_power_of_2(repeats),
        V=features,
        VP=triton.next_power_of_2(features),
        STAGED=STAGED,
        **UNFUSED,
    )
    return out
