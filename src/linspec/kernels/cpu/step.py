"""A whole decode step in one call of the C library: no Python between layers.

    steps = NativeStep.of(model)          # or the reason why this model cannot
    output = steps.run(inputs, dense_groups, places, state)

It computes what `Decoder.step` computes layer by layer, on the same state: trees of up to 64 staged
nodes a slot (`run`), or a longer chain of one slot (`run_chain`), which the C side sees as pieces of 64. A
node gets the same bits whatever else is in the step and whether its ancestors are staged or committed,
except where a group of a linear mixer closes in between.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p, pointer
from typing import TYPE_CHECKING, Any, cast

import torch

from linspec.decoding.step import MAX_STAGED
from linspec.decoding.tree import Shape, chain_shape
from linspec.errors import InputError, StateError
from linspec.kernels.cpu.library import BF16, F32, LinearStruct, Table, load
from linspec.kernels.cpu.linear import NativeLinear
from linspec.kernels.cpu.space import Space
from linspec.kernels.cpu.threads import native_threads
from linspec.kernels.norm import InferenceRMSNorm
from linspec.utils.messages import shown

if TYPE_CHECKING:
    from linspec.decoding.step import StepInput
    from linspec.mixers.base import Mixer
    from linspec.models.block import Block
    from linspec.models.decoder import Decoder
    from linspec.state.sequence_states import SequenceStates

# Widest head that the C side has room for.
_HEAD_WIDTH = 512


class _Layer(Table):
    """`ls_layer` of csrc/step.c."""

    _fields_ = (
        *((name, c_int64) for name in ("window", "group", "span")),
        *((name, c_int32) for name in ("part", "squares", "taps", "conv_history")),
        ("alpha", c_float),
        *((name, c_void_p) for name in ("kernel", "mixer_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, POINTER(LinearStruct)) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("keys", "values", "sums")),
        *((name, c_int64) for name in ("key_stride", "value_stride")),
        *((name, c_int32) for name in ("quantized", "row_bytes")),
    )


class _Decoder(Table):
    """`ls_decoder` of csrc/step.c."""

    _fields_ = (
        *((name, c_int32) for name in ("layers", "width", "heads", "kv_heads", "head_width")),
        *((name, c_int32) for name in ("mlp_width", "vocabulary", "embed_kind")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("embed", "final_norm")),
        ("head", POINTER(LinearStruct)),
        ("layer", POINTER(_Layer)),
    )


class _Feed(Table):
    """`ls_feed` of csrc/step.c."""

    _fields_ = (
        *((name, c_int32) for name in ("slot", "first", "nodes", "staged")),
        ("bases", POINTER(c_int32)),
        ("ancestors", POINTER(c_uint64)),
    )


class _Batch(Table):
    """`ls_batch` of csrc/step.c."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "inputs", "wanted", "chained")),
        *((name, POINTER(c_int32)) for name in ("ids", "places", "outputs")),
        *((name, c_void_p) for name in ("cosines", "sines")),
        ("feed", POINTER(_Feed)),
        *((name, c_void_p) for name in ("hidden", "logits")),
    )


class NativeStep:
    """The prepared decoder as the table that the C side reads."""

    def __init__(self, model: Decoder) -> None:
        found = load()
        assert found.library is not None
        self._call, self._workspace = _functions(found.library)
        self.model = model
        self._layers = (_Layer * model.config.layers)()
        for block, layer in zip(model.layers, self._layers, strict=True):
            _describe(block, layer)
        self._decoder = self._describe_decoder()
        self._state: tuple[tuple[int, torch.Size], ...] = ()
        self._space = Space()
        self._tables = (torch.empty(0), torch.empty(0))

    def _describe_decoder(self) -> _Decoder:
        model, config = self.model, self.model.config
        norm = cast(InferenceRMSNorm, model.norm)
        return _Decoder(
            layers=config.layers,
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            mlp_width=config.mlp_width,
            vocabulary=config.vocab_size,
            embed_kind=F32 if model.embed.weight.dtype == torch.float32 else BF16,
            eps=config.norm_eps,
            embed=model.embed.weight.data_ptr(),
            final_norm=norm.weight.data_ptr(),
            head=pointer(cast(NativeLinear, model.head).struct()),
            layer=self._layers,
        )

    def run(
        self,
        inputs: Sequence[StepInput],
        shapes: Sequence[Shape],
        places: Sequence[Sequence[int]],
        wanted: Sequence[int],
        state: SequenceStates,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [P, D] and logits [P, vocab] of the `wanted` of all new nodes, packed.

        shapes: of all that each slot has staged then; places: positions of the new nodes of each feed.
        Rows are staged in `state`, which must have room; recording them is the caller's.
        """
        self._bind(state)
        return self._run(
            [token for feed in inputs for token in feed.tokens],
            [place for each in places for place in each],
            wanted,
            _feeds(inputs, shapes, state),
        )

    def run_chain(
        self, feed: StepInput, places: Sequence[int], wanted: Sequence[int], state: SequenceStates
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run` for one chain of any length from the last committed token, such as a prompt.

        Its entries are staged aside, as `stage_long` of a state does.
        """
        self._state = ()
        rooms = [iter(part.room_aside(feed.slot, len(feed.tokens))) for part in state.parts]
        for layer, (part, index) in zip(self._layers, state.layers, strict=True):
            number = state.parts.index(part)
            keys, values = next(rooms[number])
            sums = part.sums[index, feed.slot] if part.sums.numel() else None
            _place(layer, number, part, keys[None], values[None], sums)
        return self._run(feed.tokens, places, wanted, _pieces(feed, state), chained=True)

    def _run(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        inputs: ctypes.Array[_Feed],
        chained: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = self._rotary(max(positions) + 1)
        config = self.model.config
        hidden = torch.empty(len(wanted), config.width)
        logits = torch.empty(len(wanted), config.vocab_size)
        batch = _Batch(
            rows=len(ids),
            inputs=len(inputs),
            wanted=len(wanted),
            chained=chained,
            ids=_tokens(ids, config.vocab_size),
            places=_ints(positions),
            outputs=_ints(wanted),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            feed=inputs,
            hidden=hidden.data_ptr(),
            logits=logits.data_ptr(),
        )
        space = self._space.at_least(self._workspace(self._decoder, batch))
        self._call(self._decoder, batch, space, native_threads())
        return hidden, logits

    def _bind(self, state: SequenceStates) -> None:
        """Tell the C side where the state's buffers are, which move as caches grow."""
        # sizes too: a new state may lie where an old one was
        at = tuple(
            (rows.data_ptr(), rows.shape)
            for part in state.parts
            for rows in (part.keys, part.values, part.sums)
        )
        if at == self._state:
            return
        # known when it is done: a process may be forked half-way
        self._state = ()
        for layer, (part, index) in zip(self._layers, state.layers, strict=True):
            sums = part.sums[index] if part.sums.numel() else None
            _place(
                layer,
                state.parts.index(part),
                part,
                part.keys[index],
                part.values[index],
                sums,
            )
        self._state = at

    def _rotary(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary factors of positions 0.. count - 1 and more: [P, K] each."""
        have = len(self._tables[0])
        if have < count:
            # never less than twice as many: a growing text must not recompute it often
            positions = torch.arange(max(count, 2 * have, 256))
            cosines, sines = self.model.rotary(positions, torch.float32)
            self._tables = cosines.flatten(1).contiguous(), sines.flatten(1).contiguous()
        return self._tables


def native_step(model: Decoder) -> NativeStep | None:
    """The one-call form of a prepared model; None if `why_not` has a reason."""
    return None if why_not(model) else NativeStep(model)


def why_not(model: Decoder) -> str | None:
    """Why a prepared model has to run layer by layer; None if one call can do it."""
    found, config = load(), model.config
    if found.library is None:
        return found.reason
    if config.positions != "rope" or config.norm != "rms":
        return "only RMS norms and rotary positions are in the one-call step"
    if not config.gated_mlp or config.activation != "silu":
        return "only gated SiLU is in the one-call step"
    if config.head_width > _HEAD_WIDTH or config.head_width % 2:
        return f"heads of {config.head_width} features are not in the one-call step"
    layers = [part for block in model.layers for part in _linears(block)] + [model.head]
    if not all(isinstance(layer, NativeLinear) for layer in layers):
        return "the weights are not packed for linspec's kernels"
    if model.embed.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"embeddings of {model.embed.weight.dtype} are not in the one-call step"
    others = {block.mixer.mixer.name for block in model.layers if not _known(block.mixer)}
    return f"mixers {', '.join(sorted(others))} are not in the one-call step" if others else None


def _known(mixer: Mixer) -> bool:
    form = mixer.native_form()
    return form is not None


def _linears(block: Block) -> list[Any]:
    return [block.mixer.qkv, block.mixer.o, block.mlp.gate_up, block.mlp.down]


def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    library.ls_step_workspace.restype = c_int64
    library.ls_step_workspace.argtypes = [POINTER(_Decoder), POINTER(_Batch)]
    library.ls_step.restype = None
    library.ls_step.argtypes = [POINTER(_Decoder), POINTER(_Batch), c_void_p, c_int32]
    return library.ls_step, library.ls_step_workspace


def _describe(block: Block, layer: _Layer) -> None:
    """What of a block stays the same for all states."""
    mixer = block.mixer
    form = mixer.native_form()
    assert form is not None
    for name, linear in zip(("qkv", "out", "gate_up", "down"), _linears(block), strict=True):
        setattr(layer, name, pointer(linear.struct()))
    layer.mixer_norm = cast(InferenceRMSNorm, block.mixer_norm).weight.data_ptr()
    layer.mlp_norm = cast(InferenceRMSNorm, block.mlp_norm).weight.data_ptr()
    if mixer.config.qk_norm:
        layer.q_norm, layer.k_norm = mixer.q_norm.weight.data_ptr(), mixer.k_norm.weight.data_ptr()
    layer.window, layer.group, layer.span = form.window, form.group, form.span
    layer.squares, layer.alpha, layer.taps = form.squares, form.alpha, mixer.mixer.taps
    if layer.taps:
        layer.kernel = mixer.taps.data_ptr()


def _place(
    layer: _Layer,
    number: int,
    part: Any,
    keys: torch.Tensor,
    values: torch.Tensor,
    sums: torch.Tensor | None,
) -> None:
    """Where a layer finds its rows [slots, Hkv, ., .], in the state of kind `number`."""
    layer.part, layer.conv_history = number, part.spec.conv_history
    # in bytes: rows are floats or codes
    size = keys.element_size()
    layer.quantized, layer.row_bytes = part.entries.quantized, keys.stride(2) * size
    layer.keys, layer.key_stride = keys.data_ptr(), keys.stride(1) * size
    layer.values, layer.value_stride = values.data_ptr(), values.stride(1) * size
    layer.sums = None if sums is None else sums.data_ptr()


def _feeds(
    inputs: Sequence[StepInput], shapes: Sequence[Shape], state: SequenceStates
) -> ctypes.Array[_Feed]:
    table = (_Feed * len(inputs))()
    first = 0
    for entry, feed, shape in zip(table, inputs, shapes, strict=True):
        new, staged = len(feed.tokens), len(shape)
        entry.slot, entry.first, entry.nodes, entry.staged = feed.slot, first, new, staged
        entry.bases = _ints(
            [part.lengths[feed.slot] - part.base_positions[feed.slot] for part in state.parts]
        )
        entry.ancestors = (c_uint64 * staged)(*shape.ancestor_bits)
        first += new
    return table


def _pieces(feed: StepInput, state: SequenceStates) -> ctypes.Array[_Feed]:
    """A chain in pieces, each of which finds those before it among the committed rows of slot 0."""
    count = len(feed.tokens)
    bases = [part.lengths[feed.slot] - part.base_positions[feed.slot] for part in state.parts]
    table = (_Feed * -(-count // MAX_STAGED))()
    for entry, first in zip(table, range(0, count, MAX_STAGED), strict=True):
        nodes = min(MAX_STAGED, count - first)
        entry.first, entry.nodes, entry.staged = first, nodes, nodes
        entry.bases = _ints([base + first for base in bases])
        entry.ancestors = (c_uint64 * nodes)(*chain_shape(nodes).ancestor_bits)
    return table


def _tokens(ids: Sequence[int], vocabulary: int) -> ctypes.Array[c_int32]:
    """Token ids, each a row of the embeddings: the C side reads it unseen."""
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise InputError(
            f"token ids from {shown(min(ids))} to {shown(max(ids))} are not all in 0..{vocabulary - 1}, "
            "which this model has"
        )
    return _ints(ids)


def _ints(numbers: Sequence[int]) -> ctypes.Array[c_int32]:
    try:
        # ctypes would cut off high bits
        return (c_int32 * len(numbers)).from_buffer(array("i", numbers))
    except OverflowError as error:
        raise StateError(
            "a text is longer than the 2^31 tokens that the kernels can count; shorten it"
        ) from error
