"""The steps of a decoder through a kernel: its state and the inputs of a step, as the kernel reads them.

step = one_call(model)                # None where the model has to run layer by layer
print(why_not(model))                 # the reason
output = step.run(inputs, shapes, positions, outputs, state, places)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from linspec.decoding.judged import Onward
from linspec.decoding.step import CHAIN, OVERWRITING, TREE, StepInput
from linspec.decoding.tree import Shape, chain_shape
from linspec.kernels.cpu.reasons import why_not as why_not_on_cpu
from linspec.kernels.cpu.reasons import why_not_over as why_not_over_on_cpu
from linspec.kernels.cpu.step import CpuStep, Stepped
from linspec.kernels.step_plan import (
    AttentionPlan,
    LayerPlan,
    NewNodes,
    PageList,
    PartBuffers,
    PartPlan,
    PastList,
    SummedPlan,
)
from linspec.models.arranged_block import ArrangedBlock
from linspec.models.block import Block
from linspec.models.fused_block import FusedBlock
from linspec.models.step_outputs import WholeOutput
from linspec.models.step_plan import step_plan, untold
from linspec.state.branches import carried
from linspec.state.canvas import Canvas
from linspec.state.group_sums import GroupSums
from linspec.state.sequence_states import SequenceStates, places_of
from linspec.state.shadow import ShadowState
from linspec.utils.process_lock import ProcessLock

if TYPE_CHECKING:
    from linspec.models.decoder import Decoder


def one_call(model: Decoder) -> OneCall | None:
    """The one-call form of a model in its inference form; None if `why_not` has a reason."""
    return None if why_not(model) else OneCall(CpuStep(step_plan(model)))


def why_not(model: Decoder) -> str | None:
    """Every reason why a model in its inference form runs layer by layer; None if one call can do it."""
    kinds = sorted(
        {type(block) for block in model.layers} - {Block, ArrangedBlock, FusedBlock}, key=repr
    )
    if kinds:
        names = ", ".join(kind.__name__ for kind in kinds)
        return f"{names} has no plan for a step in one call"
    names = ", ".join(untold(model.config))
    settings = f"no plan for a step in one call has this model's {names}" if names else None
    plan = step_plan(model)
    # tokens that see each other both ways overwrite
    over = None if model.config.causal else why_not_over_on_cpu(plan)
    reasons = (settings, why_not_on_cpu(plan), over)
    return "; ".join(reason for reason in reasons if reason) or None


class OneCall:
    """The steps of one decoder through a kernel, against whatever state they come with."""

    # on a CPU nobody waits for a device, and verifiers judge
    judging = False

    def __init__(self, kernel: CpuStep) -> None:
        self.kernel = kernel
        # of inputs that it takes
        self._kinds = {TREE, CHAIN}
        if why_not_over_on_cpu(kernel.plan) is None:
            self._kinds.add(OVERWRITING)
        self._placed: tuple[Any, ...] = ()
        self._one_at_a_time = ProcessLock()

    def takes(self, inputs: Sequence[StepInput]) -> bool:
        """Whether it computes inputs of their kind, which all of them have."""
        return inputs[0].kind in self._kinds

    def judges(self, inputs: Sequence[StepInput], shapes: Sequence[Shape]) -> frozenset[int]:
        """None of them."""
        return frozenset()

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
        """Hidden states [P, D] and logits [P, vocab] of the `outputs` of all M new nodes, packed.

        With them [layers, M, D] that each of `layers` puts out, in ascending order. onward: of no
        meaning here, where nothing is judged.

        shapes: of all that each slot has staged then; positions: of the new nodes of each input. places: the
        slots of the buffers in which a slot and its branches lie, where it has any.
        Inputs are such as it `takes`. Keys and values are staged in `state`, which must have room;
        recording them is the caller's.
        """
        nodes = [
            NewNodes(
                each.slot,
                each.tokens,
                at,
                shape,
                _committed(state, each.slot),
                _given(each),
                each.overwrite,
                each.blocks,
            )
            for each, shape, at in zip(inputs, shapes, positions, strict=True)
        ]
        if places:
            _branch_off(nodes, inputs, places)
        # the kernel knows the buffers of one state at a time, and engines may share a model
        with self._one_at_a_time:
            if inputs[0].kind == CHAIN:
                return WholeOutput(*self._run_chains(nodes, outputs, state, layers))
            for new in nodes:
                _make_ready(state, new.slot, max(new.positions))
            self._place_for(inputs, state)
            run = self.kernel.run_over if inputs[0].kind == OVERWRITING else self.kernel.run
            return WholeOutput(*run(nodes, outputs, layers))

    def _place_for(self, inputs: Sequence[StepInput], state: SequenceStates) -> None:
        """`place`, with all rows in the buffers where the kernel reads no pages."""
        self.place(state)
        if self.kernel.buffers_only:
            for each in inputs:
                state.unshare(each.slot)
                # what came back takes the room that was there for new nodes
                if each.overwrite is None:
                    state.reserve(each.slot, len(each.tokens))
            self.place(state)

    def place(self, state: SequenceStates) -> None:
        """Tell the kernel where the buffers of a state are now."""
        if _places(state) != self._placed:
            # known when it is done: a process may be forked half-way
            self._placed = ()
            self._keep_judges(state)
            self.keep_sums(state)
            self.kernel.place(_buffers(state, self.kernel.plan.layers))
            self._placed = _places(state)

    def _keep_judges(self, state: SequenceStates) -> None:
        """Have kept what judges pages where a layer selects by it."""
        for layer, parts in zip(self.kernel.plan.layers, state.layers, strict=True):
            for plan, (part, _) in zip(layer.parts, places_of(parts), strict=True):
                if isinstance(plan.attention, AttentionPlan) and plan.attention.chosen:
                    part.keep_judge(plan.attention.coded)

    def keep_sums(self, state: SequenceStates) -> None:
        """Have the sums of groups kept where a layer reads them of a canvas; `place` makes room for more."""
        if self.kernel.plan.causal:
            return
        for layer, parts in zip(self.kernel.plan.layers, state.layers, strict=True):
            for plan, (part, _) in zip(layer.parts, places_of(parts), strict=True):
                _sums_of(plan, part)

    def _run_chains(
        self,
        nodes: Sequence[NewNodes],
        outputs: Sequence[int],
        state: SequenceStates,
        layers: Sequence[int],
    ) -> Stepped:
        """One after the other; their rows are staged aside, as `stage_long` of a state does."""
        self._placed = ()
        self._keep_judges(state)
        results: list[Stepped] = []
        first = 0
        for new in nodes:
            rows = range(first, first + len(new.tokens))
            self.kernel.place(_buffers_aside(state, self.kernel.plan.layers, new.slot, len(rows)))
            if self.kernel.buffers_only:
                state.unshare(new.slot)
                self.kernel.place(
                    _buffers_aside(state, self.kernel.plan.layers, new.slot, len(rows))
                )
            wanted = [row - first for row in outputs if row in rows]
            results += self._run_aside(new, wanted, state, layers)
            first = rows.stop
        hidden, logits, states = zip(*results, strict=True)
        return torch.cat(hidden), torch.cat(logits), torch.cat(states, 1)

    def _run_aside(
        self,
        new: NewNodes,
        outputs: Sequence[int],
        state: SequenceStates,
        layers: Sequence[int],
    ) -> Iterator[Stepped]:
        """One chain, whose buffers the kernel knows, part by part where segments close on the way."""
        shadows, first, count = _shadows(state), 0, len(new.tokens)
        while first < count:
            start = new.positions[first]
            ends = [part.last_of_segments(new.slot, start) - start + 1 + first for part in shadows]
            last = min([count, *ends])
            _make_ready(state, new.slot, start)
            # what is staged aside is the only slot there
            some = new if last - first == count else _some_of(new, slice(first, last))
            wanted = [row - first for row in outputs if first <= row < last]
            yield self.kernel.run_chain(replace(some, slot=0), wanted, layers)
            first = last


def _some_of(new: NewNodes, part: slice) -> NewNodes:
    """Neighbouring nodes of a chain, behind those before them as if these were committed."""
    return replace(
        new,
        tokens=new.tokens[part],
        positions=new.positions[part],
        shape=chain_shape(part.stop - part.start),
        committed=[rows + part.start for rows in new.committed],
        embeddings=None if new.embeddings is None else new.embeddings[part],
    )


def _shadows(state: SequenceStates) -> list[ShadowState]:
    return [part for part in state.parts if isinstance(part, ShadowState)]


def _make_ready(state: SequenceStates, slot: int, last: int) -> None:
    """Have closed what nodes up to position `last` of a slot see closed."""
    for part in _shadows(state):
        part.make_ready(slot, last)


def _places(state: SequenceStates) -> tuple[Any, ...]:
    """Where the buffers of a state are; sizes and kinds too: a new state may lie where an old one was."""
    placed: tuple[Any, ...] = tuple(
        (rows.data_ptr(), rows.shape, rows.dtype)
        for part in state.parts
        for rows in (part.keys, part.values, part.sums, *_beside(part))
    )
    grows = [part for part in state.parts if part.grows]
    placed += tuple(part.page_list(0) for part in grows)
    placed += tuple(part.past_list(0) for part in _shadows(state))
    return placed + tuple(_judges_of(part) for part in grows)


def _beside(part: Any) -> list[torch.Tensor]:
    """The sums of groups that kernels keep beside entries, and of how many of these they are."""
    kept = part.group_sums.values() if isinstance(part, Canvas) else ()
    return [each for sums in kept for each in (sums.sums, sums.rows)]


def _judges_of(part: Any) -> tuple[tuple[bool, int, int, int], ...]:
    return tuple(
        (coded, judge.kept.data_ptr(), judge.counts.data_ptr(), judge.kept.shape[3])
        for coded, judge in part.judges.items()
    )


def _sums_of(plan: PartPlan, part: Any) -> GroupSums | None:
    """The sums of groups that a part reads of a canvas; None where it reads none."""
    attention = plan.attention
    if not isinstance(part, Canvas) or attention is None or not attention.group:
        return None
    if not attention.alpha:
        return None
    features = attention.features if isinstance(attention, SummedPlan) else part.spec.key_width
    return part.keep_sums(attention.group, features, part.spec.value_width)


def _given(step_input: StepInput) -> torch.Tensor | None:
    """The embeddings that a caller gave, as kernels read them."""
    given = step_input.embeddings
    return None if given is None else given.float().contiguous()


def _branch_off(
    nodes: Sequence[NewNodes], inputs: Sequence[StepInput], places: Mapping[int, Sequence[int]]
) -> None:
    """Let branches go to their places, and what they leave behind them to those of the next ones."""
    for slot, mine in places.items():
        some = [new for new, each in zip(nodes, inputs, strict=True) if each.slot == slot]
        rows = carried([new.overwrite or () for new in some])
        for at, (new, counts) in enumerate(zip(some, rows, strict=True)):
            new.slot = mine[at]
            if any(counts):
                new.behind, new.carried = mine[at + 1 :], counts


def _committed(state: SequenceStates, slot: int) -> list[int]:
    """Rows of `slot` in the state of each kind of layer."""
    return [part.lengths[slot] - part.base_positions[slot] for part in state.parts]


def _buffers(state: SequenceStates, layers: Sequence[LayerPlan]) -> list[list[PartBuffers]]:
    """Where every part of every layer finds its rows."""

    def of(plan: PartPlan, part: Any, index: int) -> PartBuffers:
        sums = part.sums[index] if part.sums.numel() else None
        pages = part.page_list(index) if part.grows else None
        past = part.past_list(index) if isinstance(part, ShadowState) else None
        found = _part_buffers(state, part, part.keys[index], part.values[index], sums, pages, past)
        found = _with_judge(found, plan, part, index, slice(None))
        of_groups = _sums_of(plan, part)
        if of_groups is None:
            return found
        return replace(found, group_sums=of_groups.sums[index], group_rows=of_groups.rows[index])

    return _of_parts(of, state, layers)


def _buffers_aside(
    state: SequenceStates, layers: Sequence[LayerPlan], slot: int, new: int
) -> list[list[PartBuffers]]:
    """As `_buffers` for the rows of one slot, with room for a chain of `new` nodes."""
    rooms = {id(part): part.room_aside(slot, new) for part in state.parts}

    def of(plan: PartPlan, part: Any, index: int) -> PartBuffers:
        keys, values = rooms[id(part)][index]
        sums = part.sums[index, slot] if part.sums.numel() else None
        pages = part.page_list(index, slot) if part.grows else None
        past = part.past_list(index, slot) if isinstance(part, ShadowState) else None
        found = _part_buffers(state, part, keys[None], values[None], sums, pages, past)
        return _with_judge(found, plan, part, index, slice(slot, slot + 1))

    return _of_parts(of, state, layers)


def _of_parts(
    of: Callable[[PartPlan, Any, int], PartBuffers],
    state: SequenceStates,
    layers: Sequence[LayerPlan],
) -> list[list[PartBuffers]]:
    """`of` for every part of every layer, with its place in the state."""
    return [
        [of(plan, *place) for plan, place in zip(layer.parts, places_of(places), strict=True)]
        for layer, places in zip(layers, state.layers, strict=True)
    ]


def _part_buffers(
    state: SequenceStates,
    part: Any,
    keys: torch.Tensor,
    values: torch.Tensor,
    sums: torch.Tensor | None,
    pages: PageList | None,
    past: PastList | None,
) -> PartBuffers:
    return PartBuffers(
        kind=state.parts.index(part),
        keys=keys,
        values=values,
        sums=sums,
        conv_history=part.spec.conv_history,
        pages=pages,
        past=past,
    )


def _with_judge(
    buffers: PartBuffers, plan: PartPlan, part: Any, index: int, slots: slice
) -> PartBuffers:
    """With what judges the pages of a part, where its nodes select."""
    attention = plan.attention
    if not isinstance(attention, AttentionPlan) or not attention.chosen:
        return buffers
    judge = part.judges[attention.coded]
    return replace(buffers, judge=judge.kept[index, slots], judged=judge.counts[index, slots])
