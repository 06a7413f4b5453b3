"""Linear states of the nodes of token trees, row by row, in Triton.

    S_t = a_t S_{t-1} + k_t u_tᵀ,    o_t = q_t S_t

with a_t = 1 (summed), one factor per channel or per head (fading; Yang et al. 2024, arXiv 2312.06635), and
u_t = v_t, or b_t (v_t - a_t S_{t-1}ᵀ k_t) by the delta rule (Yang et al. 2025, arXiv 2412.06464). A node
starts from the state of its slot and takes the rows on its path one after the other. Rows that are folded
into a state take the same steps. So a node's bits depend neither on the tree around it nor on which rows of
its path were folded before, and no product of factors can overflow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from linspec.decoding.tree_paths import STAGED, TreePaths
from linspec.errors import ConfigError
from linspec.kernels.gpu.fading import MAPS, Fading
from linspec.kernels.gpu.triton.arithmetic import NORM_FLOOR, UNFUSED
from linspec.kernels.gpu.triton.available import require

# columns of a state that a program has
_COLUMNS = 32


@triton.jit
def _mapped(x, known, MAP: tl.constexpr):
    """φ of one vector."""
    if MAP == 1:
        size = tl.sqrt(tl.sum(tl.where(known, x * x, 0.0), 0))
        x = x / tl.maximum(size, NORM_FLOOR)
    if MAP == 2:
        x = tl.where(known, x, float("-inf"))
        x = tl.exp(x - tl.max(x, 0))
        x = x / tl.sum(x, 0)
    if MAP == 3:
        x = tl.maximum(x, 0.0)
    if MAP == 4:
        # elu and 1, of what is there
        x = tl.where(known, tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0))), 0.0)
    return x


@triton.jit
def _advance(
    state, from_k, from_v, channel, column, written,
    K: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr, DELTA: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """The state after one more row: key, then log a, then b. written: else the row only fades it."""
    if GATES == 1:
        state = state * tl.exp(tl.load(from_k + K).to(tl.float32))
    if GATES > 1:
        gates = tl.load(from_k + K + channel, mask=channel < K, other=0.0)
        state = state * tl.exp(gates.to(tl.float32))[:, None]
    if written:
        known = channel < K
        k = tl.load(from_k + channel, mask=known, other=0.0).to(tl.float32)
        k = _mapped(k, known, MAP)
        new = tl.load(from_v + column, mask=column < V, other=0.0).to(tl.float32)
        if DELTA:
            rate = tl.load(from_k + K + GATES).to(tl.float32)
            new = rate * (new - tl.sum(state * k[:, None], 0))
        state = state + k[:, None] * new[None, :]
    return state


# one program for every number of nodes
@triton.jit(do_not_specialize=["count"])
def _read(
    q, states, keys, values, slots, held, nodes, depths, out, count,
    q_r, q_g, q_b, q_n, s_s, s_g, s_k, k_s, k_g, k_c, v_s, v_g, v_c,
    HEADS: tl.constexpr, REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, COLUMNS: tl.constexpr, GATES: tl.constexpr, DELTA: tl.constexpr,
    MAP: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """What the queries of one node and KV head read, in some columns."""
    r, node, g = tl.program_id(0) // count, tl.program_id(0) % count, tl.program_id(1)
    channel, column = tl.arange(0, KP), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    slot, own = tl.load(slots + r).to(tl.int64), tl.load(held + r).to(tl.int32)
    known = (channel < K)[:, None] & (column < V)
    state = tl.load(
        states + slot * s_s + g * s_g + channel[:, None] * s_k + column, mask=known, other=0.0
    )
    from_k, from_v = keys + slot * k_s + g * k_g, values + slot * v_s + g * v_g
    at = own + tl.load(depths + r * count + node)
    closed, rows = at + 1, at + 1
    if GROUP > 0:
        closed = tl.maximum(at // GROUP - (SPAN - 1), 0) * GROUP
        if GATES == 0:
            rows = closed
    for row in range(0, rows):
        lies = (own * 0 + row).to(tl.int64)
        if row >= own:
            path = nodes + (r * count + node) * STAGED
            lies = (own + tl.load(path + row - own)).to(tl.int64)
        state = _advance(
            state, from_k + lies * k_c, from_v + lies * v_c, channel, column, row < closed,
            K, V, GATES, DELTA, MAP,
        )  # fmt: skip
    for repeat in range(REPEATS):
        from_q = q + r * q_r + g * q_g + repeat * q_b + node * q_n
        query = tl.load(from_q + channel, mask=channel < K, other=0.0).to(tl.float32)
        read = tl.sum(_mapped(query, channel < K, MAP)[:, None] * state, 0)
        to = (((r * HEADS + g) * REPEATS + repeat) * count + node).to(tl.int64) * V + column
        tl.store(out + to, read.to(out.dtype.element_ty), mask=column < V)


@triton.jit
def _fold(
    states, keys, values, slots, rows, counts, rows_r, rows_m,
    s_s, s_g, s_k, k_s, k_g, k_c, v_s, v_g, v_c,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr,
    GATES: tl.constexpr, DELTA: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Rows of one slot and KV head into some columns of its state."""
    r, g = tl.program_id(0), tl.program_id(1)
    channel, column = tl.arange(0, KP), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    slot, count = tl.load(slots + r).to(tl.int64), tl.load(counts + r).to(tl.int32)
    if count > 0:
        place = states + slot * s_s + g * s_g + channel[:, None] * s_k + column
        known = (channel < K)[:, None] & (column < V)
        state = tl.load(place, mask=known, other=0.0)
        from_k, from_v = keys + slot * k_s + g * k_g, values + slot * v_s + g * v_g
        for row in range(0, count):
            lies = tl.load(rows + r * rows_r + row * rows_m).to(tl.int64)
            state = _advance(
                state, from_k + lies * k_c, from_v + lies * v_c, channel, column, True,
                K, V, GATES, DELTA, MAP,
            )  # fmt: skip
        tl.store(place, state, mask=known)


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
    """What the nodes of a step read through their states: q [R, Hkv, rep, N, K] -> [R, Hkv, rep, N, V].

    states [slots, Hkv, K, V] float32 are those before the rows of keys [slots, Hkv, C, K + E] and values
    [slots, Hkv, C, V], which have the `held` [R] committed rows of `slots` [R] that are not folded yet and
    the staged ones behind. Sums are float32, the output has the dtype of q. Raises ConfigError for states of
    another dtype or shape, and where Triton cannot run.
    """
    require(q.device)
    sizes = _sizes(states, keys, values, fading)
    rows, heads, repeats, count, _ = q.shape
    out = q.new_empty(rows, heads, repeats, count, sizes["V"])
    _read[(rows * count, heads, triton.cdiv(sizes["V"], _COLUMNS))](
        *(q, states, keys, values, slots, held, paths.nodes, paths.depths, out, count),
        *(*q.stride()[:4], *states.stride()[:3], *keys.stride()[:3], *values.stride()[:3]),
        **sizes,
        HEADS=heads,
        REPEATS=repeats,
        GROUP=fading.group,
        SPAN=fading.span,
        STAGED=STAGED,
        **UNFUSED,
    )
    return out


def fold_rows(
    states: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    fading: Fading,
) -> None:
    """Take the first `counts` [R] of `rows` [R, M] of the buffers into the states of `slots` [R], in order.

    For the path of accepted nodes, rows are the committed ones ahead of them plus their numbers. A slot that
    stands there twice has a count of 0 the second time. Shapes and errors as in `read_states`.
    """
    require(states.device)
    sizes = _sizes(states, keys, values, fading)
    _fold[(len(slots), states.shape[1], triton.cdiv(sizes["V"], _COLUMNS))](
        *(states, keys, values, slots, rows, counts, *rows.stride()),
        *(*states.stride()[:3], *keys.stride()[:3], *values.stride()[:3]),
        **sizes,
        **UNFUSED,
    )


def _sizes(
    states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, fading: Fading
) -> dict[str, int]:
    width, columns = states.shape[2:]
    if states.dtype != torch.float32:
        raise ConfigError(f"states must be float32, which long sums need, got {states.dtype}")
    if keys.shape[3] != width + fading.columns or values.shape[3] != columns:
        raise ConfigError(
            f"states of {width} x {columns} need keys of {width + fading.columns} columns with their gates "
            f"and values of {columns}, got {keys.shape[3]} and {values.shape[3]}"
        )
    if not all(each.stride(-1) == 1 for each in (states, keys, values)):
        raise ConfigError(
            "states, keys and values must have columns side by side; use contiguous()"
        )
    return {
        "K": width,
        "V": columns,
        "KP": triton.next_power_of_2(width),
        "COLUMNS": _COLUMNS,
        "GATES": fading.gates,
        "DELTA": fading.delta,
        "MAP": MAPS.index(fading.map),
    }
