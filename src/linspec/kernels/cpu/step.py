"""A whole decode step in one call of the C library: no Python between layers.

    step = CpuStep(plan)                  # if why_not(plan) is None
    step.place(buffers)                   # once, and whenever the buffers of the state have moved
    hidden, logits, layers = step.run(nodes, outputs)

It computes the nodes of token trees, up to 64 staged ones a slot, or a longer chain of one slot
(`run_chain`), which the C side sees as pieces of 64. Nodes that overwrite (`run_over`) come in such pieces
too. A node gets the same bits whatever else is in the
step and whether its ancestors are staged or committed, except where a group of a linear mixer closes
in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int32, c_int64, c_void_p, pointer
from typing import Any

import torch

from linspec.kernels.cpu.blocks import part_structs
from linspec.kernels.cpu.inputs import (
    chain_pieces,
    given,
    ints,
    overwriting_pieces,
    packed,
    staged_inputs,
    token_ids,
)
from linspec.kernels.cpu.library import load
from linspec.kernels.cpu.linear import linear_struct
from linspec.kernels.cpu.reasons import EMBEDDINGS, LINEARS
from linspec.kernels.cpu.space import Space
from linspec.kernels.cpu.structs import (
    BatchStruct,
    DecoderStruct,
    InputStruct,
    LayerStruct,
    MixerPartStruct,
    NormStruct,
    PastStruct,
    SummedStruct,
)
from linspec.kernels.cpu.threads import native_threads
from linspec.kernels.rotary import rotary_factors
from linspec.kernels.step_plan import (
    ACTIVATIONS,
    BF16,
    BLOCKS,
    ENDS,
    F16,
    F32,
    INT4,
    INT8,
    MAPS,
    WEIGHTS,
    AttentionPlan,
    LayerPlan,
    LinearPlan,
    NewNodes,
    NormPlan,
    PartBuffers,
    StepPlan,
    SummedPlan,
)

# hidden states, logits, and the states of the layers that were asked for [layers, M, D]
Stepped = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NORMS = ("mixer_norm", "mlp_norm", "mixer_out_norm", "mlp_out_norm", "q_norm", "k_norm")
_ROWS = {
    torch.float32: F32,
    torch.bfloat16: BF16,
    torch.float16: F16,
    torch.int8: INT8,
    torch.uint8: INT4,
}


class CpuStep:
    """A planned decoder as the table that the C side reads."""

    def __init__(self, plan: StepPlan) -> None:
        library = load().library
        assert library is not None
        self._call, self._workspace = _functions(library)
        # the table has addresses only: the plan keeps the tensors
        self.plan = plan
        self._layers = (LayerStruct * len(plan.layers))()
        # whether nodes that overwrite read sums of groups, and the greatest of these groups
        groups = (
            []
            if plan.causal
            else [_group(part.attention) for layer in plan.layers for part in layer.parts]
        )
        self._group = max(groups, default=0)
        # the parts of each layer, whose buffers move
        self._parts = [_parts(layer) for layer in plan.layers]
        self.buffers_only = False
        for layer, entry, parts in zip(plan.layers, self._layers, self._parts, strict=True):
            _describe(layer, plan.head_width, entry, parts)
        self._tokens = _embedding(plan)
        self.decoder = _decoder(plan, self._tokens, self._layers)
        self._space = Space()
        # of each rotary table
        self._cosines = [torch.empty(0) for _ in plan.rotaries]
        self._sines = list(self._cosines)

    def place(self, buffers: Sequence[Sequence[PartBuffers]]) -> None:
        """Tell the C side where the state of each part of each layer is, which moves as caches grow.

        `buffers_only` then says whether a part reads a paged state by windows or groups, which may begin
        inside a page: its rows have to be in the buffers.
        """
        self.buffers_only = False
        for parts, layer in zip(self._parts, buffers, strict=True):
            for entry, part in zip(parts, layer, strict=True):
                _place(entry, part)
                self.buffers_only |= part.pages is not None and not entry.pages

    def run(
        self, nodes: Sequence[NewNodes], outputs: Sequence[int], layers: Sequence[int] = ()
    ) -> Stepped:
        """Hidden states [P, D] and logits [P, vocabulary] of the `outputs` of all M new nodes, packed.

        With them [M, D] that each of `layers` puts out. Keys and values are staged in the buffers that
        `place` named, which must have room.
        """
        return self._run(self.batch(nodes), outputs, layers)

    def batch(self, nodes: Sequence[NewNodes]) -> BatchStruct:
        """New nodes of several slots as the C side reads them, without outputs."""
        return self._batch(nodes, *packed(nodes), staged_inputs(nodes))

    def run_chain(
        self, new: NewNodes, outputs: Sequence[int], layers: Sequence[int] = ()
    ) -> Stepped:
        """As `run` for one chain of any length from the last committed token, such as a prompt."""
        batch = self._batch([new], new.tokens, new.positions, chain_pieces(new))
        # what is one piece can share out long caches instead
        batch.chained = batch.inputs > 1
        return self._run(batch, outputs, layers)

    def run_over(
        self, nodes: Sequence[NewNodes], outputs: Sequence[int], layers: Sequence[int] = ()
    ) -> Stepped:
        """As `run` for nodes that overwrite, any number of a slot; only if `why_not_over` has no reason.

        All their keys and values are in place before one of them reads.
        """
        inputs = overwriting_pieces(nodes, self._group)
        batch = self._batch(nodes, *packed(nodes), inputs)
        # some inputs read what others write; where none do, they can share out long caches instead
        others = len(inputs) > len(nodes) or any(new.carried for new in nodes)
        batch.chained = others or self._group > 0
        return self._run(batch, outputs, layers)

    def _batch(
        self,
        nodes: Sequence[NewNodes],
        tokens: Sequence[int],
        positions: Sequence[int],
        inputs: ctypes.Array[InputStruct],
    ) -> BatchStruct:
        """What the new nodes are, packed."""
        cosines, sines = self.turned(max(positions) + 1)
        return BatchStruct(
            rows=len(tokens),
            inputs=len(inputs),
            tokens=token_ids(tokens, self.plan.tokens),
            positions=ints(positions),
            given=given(nodes, self.plan.width),
            cosines=cosines,
            sines=sines,
            input=inputs,
        )

    def _run(self, batch: BatchStruct, outputs: Sequence[int], layers: Sequence[int]) -> Stepped:
        plan = self.plan
        hidden = torch.empty(len(outputs), plan.width)
        logits = torch.empty(len(outputs), plan.vocabulary)
        states = torch.empty(len(layers), batch.rows, plan.width)
        batch.outputs, batch.output_rows = len(outputs), ints(outputs)
        batch.hidden, batch.logits = hidden.data_ptr(), logits.data_ptr()
        batch.layers, batch.layer_numbers = len(layers), ints(layers)
        batch.layer_states = states.data_ptr()
        threads = native_threads()
        space = self._space.at_least(self._workspace(self.decoder, batch, threads))
        self._call(self.decoder, batch, space, threads)
        return hidden, logits, states

    def turned(self, count: int) -> tuple[Any, Any]:
        """Cosines and sines of each rotary table for positions 0.. count - 1 and more, as C reads them."""
        self._turn_up_to(count)
        return _addresses(self._cosines), _addresses(self._sines)

    def _turn_up_to(self, count: int) -> None:
        """Make the rotary factors of positions 0.. count - 1 and more: [P, R] each."""
        for at, rotary in enumerate(self.plan.rotaries):
            have = len(self._cosines[at])
            if have < count:
                # never less than twice as many: a growing text must not recompute it often
                positions = torch.arange(max(count, 2 * have, 256))
                factors = rotary_factors(rotary.frequencies, positions, rotary.scale)
                self._cosines[at], self._sines[at] = factors


def _group(plan: AttentionPlan | SummedPlan | None) -> int:
    return 0 if plan is None else plan.group


def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    library.ls_step_workspace.restype = c_int64
    library.ls_step_workspace.argtypes = [POINTER(DecoderStruct), POINTER(BatchStruct), c_int32]
    library.ls_step.restype = None
    library.ls_step.argtypes = [POINTER(DecoderStruct), POINTER(BatchStruct), c_void_p, c_int32]
    return library.ls_step, library.ls_step_workspace


def _embedding(plan: StepPlan) -> Any:
    """What the C side finds where the embedding is: its numbers, or a part in blocks."""
    if isinstance(plan.embedding, LinearPlan):
        return part_structs(plan.embedding)
    return ctypes.c_char.from_address(plan.embedding.data_ptr())


def _decoder(plan: StepPlan, table: Any, layers: ctypes.Array[LayerStruct]) -> DecoderStruct:
    kind = BLOCKS if isinstance(plan.embedding, LinearPlan) else EMBEDDINGS[plan.embedding.dtype]
    same = """width heads kv_heads head_width mlp_width vocabulary score_cap embedding_scale
        residual_scale logit_scale logit_cap"""
    return DecoderStruct(
        layers=len(plan.layers),
        embedding_kind=kind,
        activation=ACTIVATIONS.index(plan.activation),
        gated=plan.gated_mlp,
        eps=plan.norm_eps,
        score_factor=plan.score_scale * plan.head_width**0.5,
        embedding=ctypes.addressof(table),
        position_rows=_address(plan.position_rows),
        turned=ints([2 * len(rotary.frequencies) for rotary in plan.rotaries]),
        final_norm=_norm(plan.final_norm),
        token_norm=_norm(plan.token_norm),
        head=_linear(plan.head),
        layer=layers,
        **{name: getattr(plan, name) for name in same.split()},
    )


def _describe(
    layer: LayerPlan, head_width: int, entry: LayerStruct, parts: ctypes.Array[MixerPartStruct]
) -> None:
    """What of a block stays the same for all states."""
    for name, computed in LINEARS.items():
        # null where it is left out
        if getattr(layer, computed):
            setattr(entry, name, _linear(getattr(layer, name)))
    for name in NORMS:
        setattr(entry, name, _norm(getattr(layer, name)))
    if layer.q_norm is not None:
        shape = layer.q_norm.weight.shape
        entry.norm_stride = head_width if len(shape) == 2 else 0
        entry.whole_norms = len(shape) == 1 and shape[0] != head_width
    entry.rotary = -1 if layer.rotary is None else layer.rotary
    entry.parallel = layer.parallel
    entry.conv_weights = _address(layer.conv_weights)
    entry.taps = 0 if layer.conv_weights is None else layer.conv_weights.shape[1]
    entry.part = parts
    at = {
        head: (number, place)
        for number, part in enumerate(layer.parts)
        for place, head in enumerate(part.heads)
    }
    entry.part_of = ints([at[head][0] for head in range(len(at))])
    entry.place = ints([at[head][1] for head in range(len(at))])


def _parts(layer: LayerPlan) -> ctypes.Array[MixerPartStruct]:
    table = (MixerPartStruct * len(layer.parts))()
    for entry, part in zip(table, layer.parts, strict=True):
        plan = part.attention
        assert plan is not None, "why_not has a reason"
        entry.kv_heads = len(part.heads)
        entry.bias = _address(plan.bias)
        entry.bias_distances = 0 if plan.bias is None else plan.bias.shape[1]
        if isinstance(plan, SummedPlan):
            entry.group, entry.span, entry.alpha = plan.group, plan.span, plan.alpha
            entry.summed = pointer(_summed(plan))
            continue
        same = """window squared_relu alpha sinks chosen coded budget asked pool positions selects
            rank chunk outliers marked"""
        for name in same.split():
            setattr(entry, name, getattr(plan, name))
        if plan.sees_far:
            entry.far_group, entry.far_span = plan.group, plan.span
        else:
            entry.group, entry.span = plan.group, plan.span
        entry.rebuilt, entry.threshold = plan.threshold is not None, plan.threshold or 0.0
    return table


def _summed(plan: SummedPlan) -> SummedStruct:
    maps, bias = plan.key_map, plan.gate_bias
    tensors = (
        "query_map key_map query_factors gain gate_map gate_scale gate_bias row_keys row_values"
    )
    return SummedStruct(
        map=MAPS.index(plan.map),
        exact=WEIGHTS.index(plan.exact),
        end=ENDS.index(plan.end),
        gates=0 if bias is None else bias.shape[-1],
        map_rows=0 if maps is None else maps.shape[-2],
        map_shared=maps is not None and len(maps) == 1,
        kept_groups=plan.kept,
        kept_rows=0 if plan.row_keys is None else len(plan.row_keys),
        **{name: _address(getattr(plan, name)) for name in tensors.split()},
        **{
            name: getattr(plan, name)
            for name in ("features", "mapped", "together", "ones", "fades", "delta", "floor")
        },
    )


def _linear(plan: LinearPlan | None) -> Any:
    assert plan is not None, "why_not has a reason"
    return pointer(linear_struct(plan))


def _norm(plan: NormPlan | None) -> Any:
    if plan is None:
        return None
    return pointer(
        NormStruct(weight=_address(plan.weight), bias=_address(plan.bias), centred=plan.centred)
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _place(entry: MixerPartStruct, part: PartBuffers) -> None:
    keys, values, sums = part.keys, part.values, part.sums
    entry.state, entry.conv_history = part.kind, part.conv_history
    # in bytes: rows are floats or codes
    size = keys.element_size()
    entry.row_kind, entry.row_bytes = _ROWS[keys.dtype], keys.stride(2) * size
    entry.keys, entry.key_stride = keys.data_ptr(), keys.stride(1) * size
    entry.value_bytes = values.stride(2) * size
    entry.values, entry.value_stride = values.data_ptr(), values.stride(1) * size
    entry.sums = None if sums is None else sums.data_ptr()
    entry.sum_floats = 0 if sums is None else sums.shape[-2] * sums.shape[-1]
    entry.group_sums = entry.group_rows = None
    if part.group_sums is not None and part.group_rows is not None:
        made = part.group_sums
        entry.group_sums, entry.group_room = made.data_ptr(), made.shape[2]
        entry.sum_floats = made.shape[3] * made.shape[4]
        entry.group_rows = ctypes.cast(part.group_rows.data_ptr(), POINTER(c_int32))
    entry.pages, entry.paged = None, None
    if entry.chosen:
        assert part.judge is not None and part.judged is not None, "who places them has them kept"
        entry.judge, entry.judge_stride = part.judge.data_ptr(), part.judge.stride(1)
        entry.judged = ctypes.cast(part.judged.data_ptr(), POINTER(c_int32))
    if part.past is not None:
        entry.past = ctypes.cast(part.past.table, POINTER(PastStruct))
        entry.left_bytes = part.past.left_bytes
    # groups that are selected are whole pages
    inside = entry.window or (entry.group and not entry.chosen)
    if part.pages is not None and not inside:
        entry.pages = part.pages.lists
        entry.paged = ctypes.cast(part.pages.positions, POINTER(c_int32))
        entry.page_keys, entry.page_values = part.pages.keys, part.pages.values
