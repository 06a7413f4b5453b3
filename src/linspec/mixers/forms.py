"""The forms of every mixer, as functions of what it says: a sequence, the nodes of a step, a long chain.

All compute

    o_t = mix of values  +  sum_{j < W} c_j v_{t-j}

where the last term is the causal depthwise convolution (one set of W taps per query head, shared by its
channels). q, k and v are what `Mixer.to_features` gives, heads before time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linspec.mixers.handed import handing
from linspec.mixers.ops.convolution import convolve, convolve_both, convolve_nodes, pad_taps
from linspec.state.contract import EntryState

if TYPE_CHECKING:
    from linspec.mixers.base import Mixer
    from linspec.state.dense_group import DenseGroup


def full(
    mixer: Mixer,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    conv_history: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mix` plus the convolution; conv_history [B, Hkv, W-1, V'] are the values before v."""
    o = mixer.mix(q, k, v, sums)
    if mixer.mixer.taps:
        o = o + convolve(v, mixer.taps, mixer.repeats, conv_history)[..., : mixer.head_width]
    return o


def full_both(
    mixer: Mixer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None
) -> torch.Tensor:
    """`mix_all` plus the centred convolution."""
    if real is not None and real.ndim == 2:
        k, v = (t.masked_fill(~real[:, None, :, None], 0.0) for t in (k, v))
    o = mixer.mix_all(q, k, v, real)
    if mixer.mixer.taps:
        o = o + convolve_both(v, mixer.taps, mixer.repeats)[..., : mixer.head_width]
    return o


def step_nodes(
    mixer: Mixer,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dense_group: DenseGroup,
    state: EntryState,
    layer: int,
) -> torch.Tensor:
    """A few nodes a slot, any tree: one masked product over the entries of each slot."""
    tree_mask, slots = dense_group.tree_mask(state), dense_group.slots
    if tree_mask.reader is not None and mixer in tree_mask.reader.reads:
        return step_by_kernels(mixer, q, k, v, dense_group, state, layer)
    keys, values = _entries(k, v, dense_group, state, layer)
    sums, before = state.read_sums(layer, slots), state.spec.conv_history
    q = state.entries.queries(q).unflatten(1, (mixer.kv_heads, mixer.repeats))
    with handing(dense_group.handed[None]):
        o = mixer.attend(q, keys, values[:, :, before:], tree_mask, sums)
    if mixer.mixer.taps:
        padded, final = mixer.padded_taps, mixer.padded_taps is not None
        if padded is None:
            padded = pad_taps(mixer.taps, mixer.kv_heads)
        values = values[..., : mixer.head_width]
        o = o + convolve_nodes(values, tree_mask, padded, before, final=final)
    return o.flatten(1, 2)


def step_by_kernels(
    mixer: Mixer,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dense_group: DenseGroup,
    state: Any,
    layer: int,
) -> torch.Tensor:
    """As `step_nodes` in a step of static shape, by kernels that read the buffers where they lie."""
    reader = dense_group.tree_mask(state).reader
    state.stage(layer, dense_group.start, dense_group.lengths, k, v)
    rows = state.rows(layer)
    q = state.entries.queries(q).unflatten(1, (mixer.kv_heads, mixer.repeats))
    o = mixer.combine(*reader.parts(q, rows, reader.reads[mixer]))
    if mixer.mixer.taps:
        padded = mixer.padded_taps
        if padded is None:
            padded = pad_taps(mixer.taps, mixer.kv_heads)
        o = o + reader.convolution(rows, padded, o)
    return o.flatten(1, 2)


def _entries(
    k: torch.Tensor, v: torch.Tensor, dense_group: DenseGroup, state: EntryState, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that the nodes of a step may attend to, their own k and v among them."""
    slot, over = dense_group.start, dense_group.overwrite
    if over is not None and dense_group.branch:
        return state.overwrite_branch(layer, slot, dense_group.branch, over, k[0], v[0])
    if over is None:
        state.stage(layer, slot, dense_group.lengths, k, v)
    else:
        state.overwrite(layer, slot, over, k[0], v[0])
    return state.read(layer, dense_group.slots, dense_group.tree_mask(state).width)


def step_both(
    mixer: Mixer,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dense_group: DenseGroup,
    state: EntryState,
    layer: int,
) -> torch.Tensor:
    """Tokens of one slot that overwrite: `full_both` over all entries that it has then, as those see them."""
    assert dense_group.overwrite is not None, "what sees both ways stages nothing"
    keys, values = _entries(k, v, dense_group, state, layer)
    at = torch.tensor(dense_group.overwrite, device=q.device)
    queries = q.new_zeros(*q.shape[:2], keys.shape[2], q.shape[3]).index_copy(2, at, q)
    return full_both(mixer, queries, keys, values, None)[:, :, at]


def step_long(
    mixer: Mixer,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dense_group: DenseGroup,
    state: EntryState,
    layer: int,
) -> torch.Tensor:
    """Long chains (prefill): the new tokens alone, or the full form from each base position on."""
    lengths = dense_group.lengths
    keys, values = state.stage_long(layer, dense_group.start, lengths, k, v)
    q = state.entries.queries(q)
    ends = [
        (state.held(slot), state.held(slot) + new)
        for slot, new in zip(dense_group.slot_range, lengths, strict=True)
    ]
    if mixer.ends_alone:
        return _ends_alone(mixer, q, keys, values, ends, dense_group)
    aligned = q.new_zeros(*q.shape[:2], keys.shape[2], q.shape[3])
    for i, (first, end) in enumerate(ends):
        aligned[i, :, first:end] = q[i, :, : end - first]
    before, sums = state.spec.conv_history, state.read_sums(layer, dense_group.slots)
    with handing(dense_group.handed[None]):
        o = full(mixer, aligned, keys, values[:, :, before:], values[:, :, :before], sums)
    out = o.new_zeros(*q.shape[:3], o.shape[3])
    for i, (first, end) in enumerate(ends):
        out[i, :, : end - first] = o[i, :, first:end]
    return out


def _ends_alone(
    mixer: Mixer,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ends: list[tuple[int, int]],
    dense_group: DenseGroup,
) -> torch.Tensor:
    """Outputs of new tokens [R, H, N, V]: those of slot i lie at the positions `ends[i]`."""
    out = values.new_zeros(*q.shape[:3], values.shape[3])
    for i, (first, end) in enumerate(ends):
        one, new = slice(i, i + 1), end - first
        given = q[one, :, :new], keys[one, :, :end], values[one, :, :end]
        with handing(dense_group.handed[i]):
            out[one, :, :new] = mixer.mix_end(*given)
    return out
