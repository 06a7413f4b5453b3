"""Attention of the nodes of token trees over a contiguous cache, in Triton.

A node reads the committed rows of its slot, and the staged ones on its path. Row p of that sequence always
meets the node in tile p // KEYS of part p // PART, wherever it lies in the buffer: committed rows as they
lie, staged ones gathered along the path. Tiles join a part in order, and parts join an output in order
(Dao et al. 2023, Flash-Decoding). So what a node gets does not depend on the tree around it, on the other
sequences, or on whether a row is committed already: a tree gives each node the bits of a step by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from linspec.decoding.tree_paths import STAGED, TreePaths
from linspec.kernels.gpu.reach import Reach
from linspec.kernels.gpu.reads import WEIGHTS
from linspec.kernels.gpu.triton.arithmetic import NORM_FLOOR, UNFUSED, interpreted, product
from linspec.kernels.gpu.triton.attention_inputs import check_inputs, check_sinks
from linspec.kernels.gpu.triton.available import require

# keys of a product, and products of a part
KEYS, TILES = 64, 4
PART = KEYS * TILES
# queries of a product: the fewest that one takes, so that it is the same for one node and for many
_ROWS = 16


@triton.jit
def _oldest(at, WINDOW: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr):
    """The first position that a node at position `at` sees."""
    first = at * 0
    if WINDOW > 0:
        first = tl.maximum(at - WINDOW + 1, first)
    if GROUP > 0:
        first = tl.maximum((at // GROUP - (SPAN - 1)) * GROUP, first)
    return first


@triton.jit
def _scores(products, scale, cap, CAPPED: tl.constexpr):
    """Scaled products, and capped ones."""
    scores = products * scale
    if CAPPED:
        # tanh as exp knows it, of what does not overflow
        small = tl.exp(-2.0 * tl.abs(scores) / cap)
        size = cap * (1.0 - small) / (1.0 + small)
        scores = tl.where(scores < 0, -size, size)
    return scores


@triton.jit
def _join(
    greatest, total, sums, q, k, v, seen, scale, cap,
    CAPPED: tl.constexpr, WEIGHTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum of weights and weighted values after one more tile of keys."""
    scores = _scores(product(q, tl.trans(k), WIDE), scale, cap, CAPPED)
    if WEIGHTS > 0:
        weights = scores
        if WEIGHTS == 1:
            weights = tl.maximum(scores, 0.0)
            weights = weights * weights
        sums += product(tl.where(seen, weights, 0.0).to(v.dtype), v, WIDE)
    else:
        scores = tl.where(seen, scores, float("-inf"))
        most = tl.maximum(greatest, tl.max(scores, 1))
        # of a row that has seen nothing yet
        finite = tl.where(most == float("-inf"), 0.0, most)
        left = tl.exp(greatest - finite)
        weights = tl.exp(scores - finite[:, None])
        total = total * left + tl.sum(weights, 1)
        sums = sums * left[:, None] + product(weights.to(v.dtype), v, WIDE)
        greatest = most
    return greatest, total, sums


@triton.jit
def _unit(rows):
    """Rows of length 1, in their dtype."""
    wide = rows.to(tl.float32)
    size = tl.sqrt(tl.sum(wide * wide, 1))
    return (wide / tl.maximum(size, NORM_FLOOR)[:, None]).to(rows.dtype)


@triton.jit
def _rows(
    from_k, from_v, at, there, k_c, v_c, channel, value, like,
    K: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Keys and values of a tile in the dtype of `like`, 0 where there are none."""
    place = at[:, None].to(tl.int64)
    k = tl.load(from_k + place * k_c + channel, mask=there[:, None] & (channel < K), other=0.0)
    v = tl.load(from_v + place * v_c + value, mask=there[:, None] & (value < V), other=0.0)
    k = k.to(like.dtype)
    if UNIT:
        k = _unit(k)
    return k, v.to(like.dtype)


# one program for every number of nodes
@triton.jit(do_not_specialize=["count"])
def _parts(
    q, keys, values, slots, held, bases, nodes, depths, greatest_to, total_to, sums_to,
    scale, cap, count, capacity, parts,
    q_r, q_g, q_b, q_n, k_s, k_g, k_c, v_s, v_g, v_c,
    HEADS: tl.constexpr, REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr,
    KEYS: tl.constexpr, TILES: tl.constexpr, STAGED: tl.constexpr,
    CAPPED: tl.constexpr, WEIGHTS: tl.constexpr, UNIT: tl.constexpr, WINDOW: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One part of the keys for the queries of EACH nodes; queries of a node follow each other."""
    part, r = tl.program_id(0), tl.program_id(2)
    g, tile = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    row = tl.arange(0, ROWS)
    node, repeat = tile * EACH + row // REPEATS, row % REPEATS
    real = (row < EACH * REPEATS) & (node < count)
    slot, own = tl.load(slots + r).to(tl.int64), tl.load(held + r).to(tl.int32)
    base = own * 0
    if bases is not None:
        base = tl.load(bases + r).to(tl.int32)
    at = base + own + tl.load(depths + r * count + node, mask=real, other=0)
    oldest = _oldest(at, WINDOW, GROUP, SPAN)
    start = (base // (KEYS * TILES) + part) * (KEYS * TILES)
    last = tl.max(tl.where(real, at, -1), 0)
    first = tl.min(tl.where(real, oldest, 2147483647), 0)
    if (last >= start) & (first < start + KEYS * TILES):
        channel, value = tl.arange(0, KP), tl.arange(0, VP)
        from_q = q + r * q_r + g * q_g + repeat[:, None] * q_b + node[:, None] * q_n
        queries = tl.load(from_q + channel, mask=real[:, None] & (channel < K), other=0.0)
        if UNIT:
            queries = _unit(queries)
        from_k, from_v = keys + slot * k_s + g * k_g, values + slot * v_s + g * v_g
        greatest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, VP), tl.float32)
        # tiles that somebody sees, first those of committed rows alone
        begin = tl.maximum(first - start, 0) // KEYS
        whole = tl.minimum(tl.maximum(base + own - start, 0) // KEYS, TILES)
        end = tl.minimum((last - start) // KEYS + 1, TILES)
        for number in range(begin, tl.minimum(whole, end)):
            position = start + number * KEYS + tl.arange(0, KEYS)
            place = position - base
            k, v = _rows(
                from_k, from_v, place, place >= 0, k_c, v_c, channel, value, queries, K, V, UNIT
            )  # fmt: skip
            seen = (place >= 0) & (position >= oldest[:, None])
            greatest, total, sums = _join(
                greatest, total, sums, queries, k, v, seen, scale, cap, CAPPED, WEIGHTS, WIDE
            )  # fmt: skip
        for number in range(tl.maximum(begin, whole), end):
            position = start + number * KEYS + tl.arange(0, KEYS)
            place = position - base
            known = (place >= 0) & (place < own)
            # staged rows lie in another order for each node
            for each in range(EACH):
                mine = tile * EACH + each
                on_path = (place >= own) & (place - own < STAGED) & (mine < count)
                path = nodes + (r * count + mine) * STAGED
                staged = tl.load(path + place - own, mask=on_path, other=-1)
                there, lies = known | (staged >= 0), tl.where(known, place, own + staged)
                k, v = _rows(
                    from_k, from_v, lies, there, k_c, v_c, channel, value, queries, K, V, UNIT
                )  # fmt: skip
                seen = there & (position >= oldest[:, None]) & (real & (node == mine))[:, None]
                greatest, total, sums = _join(
                    greatest, total, sums, queries, k, v, seen, scale, cap, CAPPED, WEIGHTS, WIDE
                )  # fmt: skip
        # [R, Hkv, rep, N, parts]
        to = (((r * HEADS + g) * REPEATS + repeat) * count + node).to(tl.int64) * parts + part
        tl.store(greatest_to + to, greatest, mask=real)
        tl.store(total_to + to, total, mask=real)
        tl.store(sums_to + to[:, None] * V + value, sums, mask=real[:, None] & (value < V))


@triton.jit
def _sinks(from_k, from_kept, lies, there, gone, k_c, kept_c, channel, K: tl.constexpr):
    """Keys or values of the sinks in float32: as they lie, or from where they are kept."""
    sink, known = tl.arange(0, lies.shape[0])[:, None], there[:, None] & (channel < K)
    place = lies[:, None].to(tl.int64) * k_c
    row = tl.load(from_k + place + channel, mask=known & ~gone, other=0.0)
    kept = tl.load(from_kept + sink * kept_c + channel, mask=known & gone, other=0.0)
    return tl.where(gone, kept, row).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _merge(
    greatest_of, total_of, sums_of, held, bases, depths, out, count, parts,
    q, keys, values, slots, nodes, kept, scale, cap,
    q_r, q_g, q_b, q_n, k_s, k_g, k_c, v_s, v_g, v_c, kept_s, kept_g, kept_w, kept_c,
    HEADS: tl.constexpr, REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, STAGED: tl.constexpr, SINKS: tl.constexpr,
    SP: tl.constexpr, CAPPED: tl.constexpr,
    PART: tl.constexpr, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """The output of one query from the sinks that are out of its reach, and from the parts that it sees."""
    query = tl.program_id(0)
    node, r = query % count, query // (count * REPEATS * HEADS)
    repeat, g = query // count % REPEATS, query // (count * REPEATS) % HEADS
    own = tl.load(held + r).to(tl.int32)
    base = own * 0
    if bases is not None:
        base = tl.load(bases + r).to(tl.int32)
    at = base + own + tl.load(depths + r * count + node)
    before = base // PART
    # what has left the buffer is in no part
    oldest = _oldest(at, WINDOW, GROUP, SPAN)
    first = tl.maximum(oldest, base) // PART - before
    value = tl.arange(0, VP)
    greatest, total = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    sums = tl.zeros((VP,), tl.float32)
    if SINKS > 0:
        # of the first group: a node reaches all of them, or none
        sink, channel = tl.arange(0, SP), tl.arange(0, KP)
        gone = base > 0
        far = gone | (oldest > 0)
        there = (sink < SINKS) & far
        path = nodes + (r * count + node) * STAGED
        staged = tl.load(path + sink - own, mask=there & (sink >= own), other=0)
        lies = tl.where(sink < own, sink, own + staged)
        slot = tl.load(slots + r).to(tl.int64)
        from_q = q + r * q_r + g * q_g + repeat * q_b + node * q_n
        row = tl.load(from_q + channel, mask=channel < K, other=0.0).to(tl.float32)
        from_k, from_v = keys + slot * k_s + g * k_g, values + slot * v_s + g * v_g
        old = kept + slot * kept_s + g * kept_g
        k = _sinks(from_k, old, lies, there, gone, k_c, kept_c, channel, K)
        v = _sinks(from_v, old + kept_w, lies, there, gone, v_c, kept_c, value, V)
        scores = _scores(tl.sum(k * row[None, :], 1), scale, cap, CAPPED)
        scores = tl.where(there, scores, float("-inf"))
        greatest = tl.maximum(greatest, tl.max(scores, 0))
        weights = tl.exp(scores - tl.where(far, tl.max(scores, 0), 0.0))
        total += tl.sum(weights, 0)
        sums += tl.sum(weights[:, None] * v, 0)
    for part in range(first, at // PART - before + 1):
        place = query.to(tl.int64) * parts + part
        new = tl.load(sums_of + place * V + value, mask=value < V, other=0.0)
        if WEIGHTS > 0:
            sums += new
        else:
            theirs = tl.load(greatest_of + place + tl.arange(0, 1))
            most = tl.maximum(greatest, theirs)
            finite = tl.where(most == float("-inf"), 0.0, most)
            left, right = tl.exp(greatest - finite), tl.exp(theirs - finite)
            total = total * left + tl.load(total_of + place) * right
            sums = sums * left + new * right
            greatest = most
    if WEIGHTS == 0:
        sums = sums / total
    to = query.to(tl.int64) * V + value
    tl.store(out + to, sums.to(out.dtype.element_ty), mask=value < V)


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
    """What the nodes of a step read: q [R, Hkv, rep, N, K] -> [R, Hkv, rep, N, V], in the dtype of q.

    keys [slots, Hkv, C, K] and values [slots, Hkv, C, V], floats of 16 or 32 bits, have the `held` [R]
    committed rows of `slots` [R] and the staged ones behind; they are read where they lie, so a view without
    the history of a convolution, or of the keys alone, will do. q is float32 or bfloat16; rows become what it
    is, and sums are float32. cap: scores s become cap·tanh(s / cap), 0 for none. weights: one of WEIGHTS.
    unit: of queries and keys of length 1. reach: which rows are seen. bases [R]: positions ahead of the first
    row of each buffer, None for none; parts begin at positions, so that bits outlive rows that leave. sinks:
    first positions that all nodes see, of the first group of `reach`, with softmax weights; kept [slots, Hkv,
    2, sinks, K]: keys and values of these, once the buffer begins behind them.

    All integers are tensors on the device, and nothing waits for it. Raises ConfigError for heads of more
    than 256 features, for other dtypes and weights, and where Triton cannot run.
    """
    require(q.device)
    check_inputs(q, keys, values, weights)
    check_sinks(sinks, weights, unit, reach, keys, values, kept, bases)
    rows, heads, repeats, count, width = q.shape
    value_width, capacity = values.shape[3], keys.shape[2]
    wide = max(_ROWS, triton.next_power_of_2(repeats))
    each = wide // repeats
    # a part more, since the first one may begin ahead of the buffer
    parts = triton.cdiv(capacity, PART) + (bases is not None)
    room = q.new_empty((rows, heads, repeats, count, parts, value_width + 2), dtype=torch.float32)
    flat, queries = room.view(-1), rows * heads * repeats * count * parts
    greatest, total, sums = flat.split((queries, queries, queries * value_width))
    padded = {
        "VP": _padded(value_width),
        "HEADS": heads,
        "REPEATS": repeats,
        "V": value_width,
    }
    common = {
        **UNFUSED,
        "WEIGHTS": WEIGHTS.index(weights),
        "WINDOW": reach.window,
        "GROUP": reach.group,
        "SPAN": reach.span,
        "K": width,
        "KP": _padded(width),
        "STAGED": STAGED,
        "CAPPED": cap > 0,
    }
    strides = *q.stride()[:4], *keys.stride()[:3], *values.stride()[:3]
    _parts[(parts, heads * triton.cdiv(count, each), rows)](
        *(q, keys, values, slots, held, bases, paths.nodes, paths.depths, greatest, total, sums),
        *(scale, cap, count, capacity, parts),
        *strides,
        **padded,
        **common,
        ROWS=wide,
        EACH=each,
        KEYS=KEYS,
        TILES=TILES,
        UNIT=unit,
        WIDE=interpreted(),
    )
    out = q.new_empty(rows, heads, repeats, count, value_width)
    _merge[(rows * heads * repeats * count,)](
        *(greatest, total, sums, held, bases, paths.depths, out, count, parts),
        *(q, keys, values, slots, paths.nodes, kept, scale, cap, *strides),
        *(kept.stride()[:4] if kept is not None else (0, 0, 0, 0)),
        SINKS=sinks,
        SP=triton.next_power_of_2(max(1, sinks)),
        **padded,
        **common,
        PART=PART,
    )
    return out


def _padded(width: int) -> int:
    """Features of a tile: a power of two, and not fewer than a product takes."""
    return max(16, triton.next_power_of_2(width))
