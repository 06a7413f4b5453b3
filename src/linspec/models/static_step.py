"""A step of static shape: the model's own layers over tables and whole buffers, recorded once for each size.

    step = StaticStep(model)              # if why_not_static(model) is None
    output = step.run(inputs, shapes, positions, outputs, state, places)

Layer by layer a GPU waits for Python: every operation of every layer is launched anew, at the sizes of this
very step. Here a step is padded to powers of two, what changes lies in tensors (`StepTables`), and the same
mixers and MLPs run over the whole buffers of the state, so that all launches together become one graph. What
follows the step in a round, as far as it needs no host, is part of the same graph: trees are judged
(`decoding/device_acceptance.py`), accepted entries move up, and heads draft. So a device may run several
rounds in a row, and the host follows (`judged_rounds.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from linspec.decoding.device_acceptance import accept, chosen_tokens, next_round
from linspec.decoding.judged import Follow, Onward
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
from linspec.models.judged_rounds import (
    Decided,
    judged_by_number,
    reserve_rounds,
    rounds_within,
)
from linspec.models.layer_path import LayerPath
from linspec.models.skipped import whole
from linspec.models.step_outputs import WholeOutput
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


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a program of a size computes beside the step: states behind `layers`; whether trees are judged,
    and by tokens that are drawn; what follows the paths; whether it goes on to the next round."""

    layers: tuple[int, ...]
    judging: bool
    drawn: bool
    follow: Follow | None
    goes_on: bool


@dataclass(frozen=True, slots=True)
class _Results:
    """What a program gives: hidden states [R · N, D], logits [R · N, vocabulary], the states behind layers.

    decided, on_path: where trees are judged, see `Decided`; the states are the hidden ones and those behind
    each layer. next_round: the tables of the trees that come next.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    found: tuple[torch.Tensor, ...]
    decided: torch.Tensor | None = None
    on_path: tuple[torch.Tensor, ...] = ()
    next_round: torch.Tensor | None = None


class StaticStep:
    """The steps of one decoder by recorded programs, against whatever state they come with.

    recorder: None runs the programs without recording them. kernels: what mixers read by that these know;
    None for torch's operations alone. runs_ahead: whether several rounds are run in a row where that is asked
    for.
    """

    judging = True

    def __init__(
        self,
        model: Decoder,
        recorder: Recorder | None,
        kernels: DeviceKernels | None = None,
        *,
        runs_ahead: bool = True,
    ) -> None:
        self._model, self._recorder, self.kernels = model, recorder, kernels
        self._runs_ahead = runs_ahead
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

    def judges(self, inputs: Sequence[StepInput], shapes: Sequence[Shape]) -> frozenset[int]:
        """Every tree that may be judged here and is all that its slot has staged."""
        return frozenset(
            number
            for number, (each, shape) in enumerate(zip(inputs, shapes, strict=True))
            if each.judge is not None and len(each.tokens) == len(shape)
        )

    def run(
        self,
        inputs: Sequence[StepInput],
        shapes: Sequence[Shape],
        positions: Sequence[Sequence[int]],
        outputs: Sequence[int],
        state: SequenceStates,
        places: Mapping[int, Sequence[int]],
        layers: Sequence[int] = (),
        onward: Onward | None = None,
    ) -> WholeOutput:
        """As `OneCall.run`; what is judged has no part in `outputs`."""
        onward = onward or Onward()
        judges = {number: inputs[number].judge for number in self.judges(inputs, shapes)}
        several = self._runs_ahead and len(judges) == len(inputs)
        rounds = rounds_within(onward.rounds, shapes) if several else 1
        drawn = any(each is not None and each.temperature > 0 for each in judges.values())
        follow = onward.follow if judges else None
        asked = _Asked(tuple(layers), bool(judges), drawn, follow, rounds > 1)
        # tables and results are those of the model, whoever steps
        with self._one_at_a_time, _on(self._model.device):
            reserve_rounds(rounds, inputs, state)
            size = Size.of(inputs, state)
            slots = [
                SlotNodes(
                    each.slot, each.tokens, at, shape, *_rows_of(state, each.slot), judges.get(n)
                )
                for n, (each, shape, at) in enumerate(zip(inputs, shapes, positions, strict=True))
            ]
            # ahead of the program: who copies to a device waits for what runs there
            every = _nodes_of(inputs, size) if layers and len(judges) < len(inputs) else []
            rows, inner = self._copied([_nodes_of(inputs, size)[at] for at in outputs], every)
            results, decided = self._results(size, slots, state, asked, rounds)
            return WholeOutput(
                results.hidden[rows],
                results.logits[rows],
                torch.stack([each[inner] for each in results.found]) if layers else rows,
                judged_by_number({n: shapes[n] for n in judges}, inputs, state, decided, layers),
            )

    def _copied(self, *numbers: Sequence[int]) -> Sequence[torch.Tensor]:
        """Lists of whole numbers on the device of the model, by one copy."""
        packed = torch.tensor(list(chain.from_iterable(numbers)), dtype=torch.long)
        return packed.to(self._model.device).split([len(each) for each in numbers])

    def _results(
        self,
        size: Size,
        slots: Sequence[SlotNodes],
        state: SequenceStates,
        asked: _Asked,
        rounds: int,
    ) -> tuple[_Results, list[Decided]]:
        """What the program of this size gives for these nodes, which holds until the next step.

        And what it decided in each of so many rounds, of which it is the last.
        """
        tables = self._tables_of(size, len(state.parts))
        tables.fill(slots)
        recorded, key = self._recorded_of(state), (size, asked)
        decided = []
        while True:
            results: _Results = recorded.run(key, lambda: self._program(tables, size, state, asked))
            if results.decided is not None:
                decided.append(Decided(results.decided, results.on_path))
            if results.next_round is None or len(decided) == rounds:
                return results, decided
            tables.put(results.next_round)

    def _program(
        self, tables: StepTables, size: Size, state: SequenceStates, asked: _Asked
    ) -> _Results:
        model, path = self._model, LayerPath(None, asked.layers)
        config, reader = model.config, None
        if self.kernels is not None:
            known = self.kernels, self.reads, config.score_scale, config.score_cap
            reader = partial(StepReader, *known)
        states: Any = StaticStates(state, tables, all_slots=size.all_slots, reader=reader)
        groups: Any = [StaticGroup(size)]
        x, ropes = model.enter(tables.tokens.flatten(), tables.positions.flatten())
        hidden = model.leave(model.run(x, ropes, groups, states, path))
        found = tuple(path.found[layer] for layer in asked.layers)
        step = _Results(hidden, model.head(hidden), found)
        return _with_verdict(step, tables, states, asked) if asked.judging else step

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


def _with_verdict(
    step: _Results, tables: StepTables, states: StaticStates, asked: _Asked
) -> _Results:
    """The second half of a round: trees are judged, accepted nodes move up, what follows is computed."""
    nodes = tables.tokens.shape
    chosen, finite = chosen_tokens(step.logits.unflatten(0, nodes), tables, drawn=asked.drawn)
    accepted = accept(tables, chosen)
    # one node is where it belongs
    if tables.columns > 1:
        states.keep(accepted.rows)
    hidden = step.hidden.unflatten(0, nodes)
    decided = torch.stack((accepted.deepest, accepted.tokens, finite.long()), 1)
    follow = None
    if asked.follow is not None:
        follow = asked.follow(accepted.of_deepest(hidden), accepted.tokens)
        decided = torch.cat((decided, follow), 1)
    found = (each.unflatten(0, nodes) for each in step.found)
    on_path = tuple(accepted.of_path(each) for each in (hidden, *found))
    onward = next_round(tables, accepted, follow) if asked.goes_on else None
    return replace(step, decided=decided, on_path=on_path, next_round=onward)


def _nodes_of(inputs: Sequence[StepInput], size: Size) -> list[int]:
    """Where the packed nodes lie among those of a size."""
    return [
        slot * size.nodes + node
        for slot, each in enumerate(inputs)
        for node in range(len(each.tokens))
    ]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launches and graphs go to the device of the model, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rows_of(state: SequenceStates, slot: int) -> tuple[list[int], list[int]]:
    """Committed rows of `slot` in the buffers of each kind of state, and positions of the first of them."""
    bases = [part.base_positions[slot] for part in state.parts]
    return [part.held(slot) for part in state.parts], bases
