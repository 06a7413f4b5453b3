"""A step of static shape: the model's own layers over tables and whole buffers, recorded once for each size.

    step = StaticStep(model)              # if why_not_static(model) is None
    hidden, logits, found = step.run(inputs, shapes, positions, outputs, state, places)

Layer by layer a GPU waits for Python: every operation of every layer is launched anew, at the sizes of this
very step. Here a step is padded to powers of two, what changes lies in tensors (`StepTables`), and the same
mixers and MLPs run over the whole buffers of the state, so that all launches together become one graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from linspec.decoding.static_mask import SlotNodes, StaticTreeMask, StepTables
from linspec.decoding.step import TREE, StepInput
from linspec.decoding.tree import Shape
from linspec.kernels.gpu.choice import DeviceKernels
from linspec.kernels.gpu.graphs import Recorded, Recorder
from linspec.kernels.gpu.reader import StepReader
from linspec.kernels.gpu.reads import DeviceRead, device_read
from linspec.mixers.base import Mixer
from linspec.models.arranged_block import ArrangedBlock
from linspec.models.block import Block
from linspec.models.layer_path import LayerPath
from linspec.models.skipped import whole
from linspec.state.sequence_states import SequenceStates
from linspec.state.static_entries import StaticEntries, StaticStates
from linspec.utils.process_lock import ProcessLock

if TYPE_CHECKING:
    from linspec.models.decoder import Decoder


_BLOCKS = (Block, ArrangedBlock)


def why_not_static(model: Decoder) -> str | None:
    """Every reason why a model has no step of static shape; None if it has one."""
    others = {type(block).__name__ for block in model.layers if type(block) not in _BLOCKS}
    known = [whole(block.mixer) for block in model.layers if type(block) in _BLOCKS]
    mixers = {each.mixer.name for each in known if not each.has_static_step()}
    reasons = {
        f"{', '.join(sorted(others))} has no step of static shape": bool(others),
        "its tokens see later ones": not model.config.causal,
        f"mixers {', '.join(sorted(mixers))} have no step of static shape": bool(mixers),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None


@dataclass(frozen=True, slots=True)
class Size:
    """Slots and nodes of each that a step has room for; all_slots: they are those of the state, in order."""

    slots: int
    nodes: int
    all_slots: bool

    @classmethod
    def of(cls, inputs: Sequence[StepInput], state: SequenceStates) -> Size:
        """The least powers of two that `inputs` fit into, but never more slots than there are."""
        slots = [each.slot for each in inputs]
        if slots == list(range(state.slots)):
            return cls(state.slots, _power_of_two(inputs), True)
        wide = min(1 << (len(slots) - 1).bit_length(), state.slots)
        return cls(wide, _power_of_two(inputs), False)


def _power_of_two(inputs: Sequence[StepInput]) -> int:
    return 1 << (max(len(each.tokens) for each in inputs) - 1).bit_length()


class StaticGroup:
    """All slots of a step as one dense group of R slots with N nodes each: see `DenseGroup`."""

    overwrite, branch, long, start = None, 0, False, 0
    slots = slice(None)

    def __init__(self, size: Size) -> None:
        self.nodes, self.lengths = size.nodes, [size.nodes] * size.slots
        self.handed: dict[int | None, dict[Hashable, Any]] = defaultdict(dict)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[R · N, ...] -> [R, N, ...]."""
        return packed.unflatten(0, (len(self.lengths), self.nodes))

    def pack(self, dense: torch.Tensor) -> torch.Tensor:
        """The inverse of `unpack`."""
        return dense.flatten(0, 1)

    def tree_mask(self, state: StaticEntries) -> StaticTreeMask:
        """That of a state, the same for all its layers."""
        return state.mask


class StaticStep:
    """The steps of one decoder by recorded programs, against whatever state they come with.

    recorder: None runs the programs without recording them. kernels: what mixers read by that these know;
    None for torch's operations alone.
    """

    def __init__(
        self,
        model: Decoder,
        recorder: Recorder | None,
        kernels: DeviceKernels | None = None,
    ) -> None:
        self._model, self._recorder, self.kernels = model, recorder, kernels
        # of each mixer that kernels know, what it reads; plans read numbers of the weights, which no
        # recording can
        self.reads = {} if kernels is None else _reads(_mixers(model))
        self._one_at_a_time = ProcessLock()
        self._tables: dict[tuple[int, int, int], StepTables] = {}
        # of each state, where its buffers are and what was recorded with them there
        self._recorded: WeakKeyDictionary[SequenceStates, tuple[Any, Recorded]] = (
            WeakKeyDictionary()
        )

    def named(self) -> str:
        """Which mixers the kernels read, and which of them torch's own operations do."""
        read = {each.mixer.name for each in self.reads}
        rest = {each.mixer.name for each in _mixers(self._model) if each not in self.reads}
        said = (", ".join(sorted(names)) or "no mixer" for names in (read, rest))
        return "{} by kernels, {} by operations of torch".format(*said)

    def takes(self, inputs: Sequence[StepInput]) -> bool:
        """Whether these inputs, all of one kind, run here: trees whose tokens have embeddings."""
        return inputs[0].kind == TREE and all(each.embeddings is None for each in inputs)

    def run(
        self,
        inputs: Sequence[StepInput],
        shapes: Sequence[Shape],
        positions: Sequence[Sequence[int]],
        outputs: Sequence[int],
        state: SequenceStates,
        places: Mapping[int, Sequence[int]],
        layers: Sequence[int] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `OneCall.run`: hidden states, logits, and the states behind `layers`, of packed nodes."""
        # tables and results are those of the model, whoever steps
        with self._one_at_a_time, _on(self._model.device):
            size = Size.of(inputs, state)
            slots = [
                SlotNodes(each.slot, each.tokens, at, shape, *_rows_of(state, each.slot))
                for each, shape, at in zip(inputs, shapes, positions, strict=True)
            ]
            hidden, logits, *found = self._results(size, slots, state, tuple(layers))
            nodes = [
                slot * size.nodes + node
                for slot, each in enumerate(inputs)
                for node in range(len(each.tokens))
            ]
            rows = torch.tensor([nodes[at] for at in outputs], device=hidden.device)
            every = torch.tensor(nodes, device=hidden.device)
            inner = torch.stack([each[every] for each in found]) if found else hidden.new_empty(0)
            return hidden[rows], logits[rows], inner

    def _results(
        self,
        size: Size,
        slots: Sequence[SlotNodes],
        state: SequenceStates,
        layers: tuple[int, ...],
    ) -> Sequence[torch.Tensor]:
        """What the program of this size gives for these nodes; it holds until the next step."""
        tables = self._tables_of(size, len(state.parts))
        tables.fill(slots)
        return self._recorded_of(state).run(
            (size, layers), lambda: self._program(tables, size, state, layers)
        )

    def _program(
        self, tables: StepTables, size: Size, state: SequenceStates, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states [R · N, D], logits [R · N, vocabulary], and the states behind each of `layers`."""
        model, path = self._model, LayerPath(None, layers)
        config, reader = model.config, None
        if self.kernels is not None:
            known = self.kernels, self.reads, config.score_scale, config.score_cap
            reader = partial(StepReader, *known)
        states: Any = StaticStates(state, tables, all_slots=size.all_slots, reader=reader)
        groups: Any = [StaticGroup(size)]
        x, ropes = model.enter(tables.tokens.flatten(), tables.positions.flatten())
        hidden = model.leave(model.run(x, ropes, groups, states, path))
        return hidden, model.head(hidden), *(path.found[layer] for layer in layers)

    def _tables_of(self, size: Size, kinds: int) -> StepTables:
        key = (size.slots, size.nodes, kinds)
        if key not in self._tables:
            self._tables[key] = StepTables(*key, self._model.device)
        return self._tables[key]

    def _recorded_of(self, state: SequenceStates) -> Recorded:
        """What was recorded with the buffers of `state` where they are now."""
        places = [
            (rows.data_ptr(), rows.shape)
            for part in state.parts
            for rows in (part.keys, part.values, part.sums)
        ]
        known = self._recorded.get(state)
        if known is None or known[0] != places:
            known = self._recorded[state] = places, Recorded(self._recorder)
        return known[1]


def _mixers(model: Decoder) -> list[Mixer]:
    """The mixers that read a state, parts of others in their place."""
    found = [each for each in model.modules() if isinstance(each, Mixer)]
    return [
        each
        for each in found
        if not any(isinstance(part, Mixer) for part in each.modules() if part is not each)
    ]


def _reads(mixers: Sequence[Mixer]) -> dict[Mixer, DeviceRead]:
    found = ((each, device_read(each.attention_plan())) for each in mixers)
    return {mixer: read for mixer, read in found if read is not None}


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launches and graphs go to the device of the model, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rows_of(state: SequenceStates, slot: int) -> tuple[list[int], list[int]]:
    """Committed rows of `slot` in the buffers of each kind of state, and positions of the first of them."""
    bases = [part.base_positions[slot] for part in state.parts]
    return [part.held(slot) for part in state.parts], bases
