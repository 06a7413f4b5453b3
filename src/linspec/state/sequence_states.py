"""What a whole decoder remembers of its sequences: a transaction over the states of all kinds of layers."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from linspec.decoding.tree import Shape
from linspec.errors import StateError
from linspec.state.contract import LayerState, Makers, StateMaker, StateOptions
from linspec.state.memory import check_growth
from linspec.state.pages import Page, bytes_of
from linspec.state.slots import NOTHING_STAGED

# the entries of the same positions in each state that grows
Pages = tuple[Page, ...]


@dataclass(frozen=True, slots=True)
class MixedState:
    """Where each part of a layer keeps its entries: a state, and the layer's index there."""

    parts: tuple[tuple[Any, int], ...]


class SequenceStates:
    """The states of up to `slots` sequences: one for each kind of layer, made by a mixer of that kind.

    makers: of each layer, () for one that is to have no state, so that no step can run through it.
    layers[i]: the state of layer i and its index there; a MixedState where a layer has several parts.
    in_kernels: whether compiled kernels may read the buffers of all layers.
    """

    def __init__(self, makers: Sequence[Makers], slots: int, options: StateOptions) -> None:
        self.slots = slots
        self._makers, self._options = list(makers), options
        kinds: dict[Hashable, list[StateMaker]] = {}
        places = [_places(each, kinds) for each in self._makers]
        made = {spec: layers[0].new_state(layers, slots, options) for spec, layers in kinds.items()}
        self.parts: list[Any] = list(made.values())
        self.layers: list[tuple[Any, int]] = [_layer(place, made) for place in places]
        self._counted: list[LayerState] = [part for part in self.parts if part.counts_tokens]
        self._without = frozenset(i for i, each in enumerate(self._makers) if each == ())
        # asked in every step
        self.in_kernels = not self._without and all(part.in_kernels for part in self._counted)
        self._staged = [NOTHING_STAGED] * slots
        # staged nodes that are never committed, and states that a step of some layers left torn
        self._ephemeral: dict[int, frozenset[int]] = {}
        self._ran: dict[int, frozenset[int]] = {}
        # the last branch of slots that have some, and the slots behind all others that each has for branches
        self._branches: dict[int, int] = {}
        self._places: dict[int, list[int]] = {}
        self._taken = slots

    def empty(self, slots: int) -> Self:
        """An empty state of the same model for `slots` sequences."""
        return type(self)(self._makers, slots, self._options)

    def length(self, slot: int) -> int:
        """Committed tokens of `slot`, in the layers that have seen most."""
        return max([part.lengths[slot] for part in self._counted])

    def staged(self, slot: int) -> Shape:
        """The shape of the staged nodes of `slot`."""
        return self._staged[slot]

    def staged_aside(self, slot: int) -> bool:
        """Whether `slot` has staged a long chain, which nothing can be staged behind."""
        return any(part.staged_aside(slot) for part in self._counted)

    # ---- room

    def reserve(self, slot: int, new: int) -> None:
        """Make room for `new` more staged nodes in `slot`."""
        for part in self.parts:
            part.reserve(slot, new)

    def unshare(self, slot: int) -> None:
        """Have what `slot` shares with others for itself: ahead of steps that are no kernel's."""
        for part in self.parts:
            part.unshare(slot)

    def check_room(self, tokens: int) -> None:
        """Raise StateError if caches cannot grow to a sequence of `tokens` tokens."""
        missing = sum(part.missing_bytes(tokens) for part in self.parts)
        check_growth(missing, tokens, self._options.device)

    # ---- the transaction

    def check_layers(self, slot: int, layers: Collection[int] | None) -> None:
        """Raise StateError if a step of `slot` cannot run through these layers; None means all.

        Some have no state, or what is staged ran through others.
        """
        if self._without and (layers is None or not self._without.isdisjoint(layers)):
            raise StateError(
                f"layers {sorted(self._without)} have no state here; name the layers of the step"
            )
        if self._staged[slot] and self._ran.get(slot) != _chosen(layers):
            raise StateError(
                f"slot {slot} has staged nodes in other layers; commit or drop them before a step "
                "through these"
            )

    def record(
        self,
        slot: int,
        staged: Shape,
        *,
        layers: Collection[int] | None = None,
        ephemeral: Sequence[bool] | None = None,
    ) -> None:
        """Note the shape of all staged nodes of `slot` after a step has staged more.

        layers: those that the step ran through, None for all. ephemeral: which of the newest nodes are
        never to be committed.
        """
        self._staged[slot] = staged
        if ephemeral:
            first = len(staged) - len(ephemeral)
            more = (first + node for node, never in enumerate(ephemeral) if never)
            self._ephemeral[slot] = self._ephemeral.get(slot, frozenset()).union(more)
        if layers is None:
            for part in self.parts:
                part.record(slot, staged)
            return
        self._ran[slot] = frozenset(layers)
        for part, count in zip(self.parts, self._run_through(layers), strict=True):
            if count:
                part.record(slot, staged)

    def _run_through(self, layers: Collection[int]) -> list[int]:
        """How many layers of each state are among `layers`."""
        found = [state for layer in layers for state, _ in places_of(self.layers[layer])]
        return [sum(state is part for state in found) for part in self.parts]

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the staged nodes of `path`, in order, and drop the others.

        States whose layers a step skipped stay as they are. Raises StateError, and changes nothing, if
        `path` is no path from the root, has an ephemeral node, or a state had only some of its layers run.
        """
        self._check_path(slot, path)
        self._check_whole(slot, path)
        for part in self.parts:
            if part.staged[slot] or slot not in self._ran:
                part.commit(slot, path)
        self._forget(slot)

    def _check_path(self, slot: int, path: Sequence[int]) -> None:
        parents, before = self._staged[slot].parents, -1
        for node in path:
            if not 0 <= node < len(parents) or parents[node] != before:
                raise StateError(
                    f"{list(path)} is not a path from the root of the {len(parents)} staged nodes"
                )
            before = node
        ephemeral = self._ephemeral.get(slot)
        if ephemeral and not ephemeral.isdisjoint(path):
            raise StateError(
                f"nodes {sorted(ephemeral.intersection(path))} of slot {slot} are ephemeral and cannot be "
                "committed; end the path before them"
            )

    def _check_whole(self, slot: int, path: Sequence[int]) -> None:
        if not path or slot not in self._ran:
            return
        ran = self._run_through(self._ran[slot])
        if any(0 < count < part.layers for count, part in zip(ran, self.parts, strict=True)):
            raise StateError(
                f"slot {slot} has staged nodes in {len(self._ran[slot])} of {len(self.layers)} layers, and "
                "skipped layers share a state with them; drop the nodes, and commit a step through all"
            )

    def _forget(self, slot: int) -> None:
        self._staged[slot] = NOTHING_STAGED
        self._ephemeral.pop(slot, None)
        self._ran.pop(slot, None)
        self._branches.pop(slot, None)

    def drop(self, slot: int) -> None:
        """Forget what `slot` has staged."""
        for part in self.parts:
            part.drop(slot)
        self._forget(slot)

    def check_overwrite(self, slot: int, positions: Sequence[int]) -> None:
        """Raise StateError unless every layer can replace its entries at these committed positions."""
        for part in self._counted:
            part.check_overwrite(slot, positions)

    def branches(self, slot: int) -> int:
        """How many branches the last step of `slot` had beside what it holds, until one is kept."""
        return self._branches.get(slot, 0)

    def open_branches(self, slot: int, rows: Sequence[Sequence[int]]) -> list[int]:
        """Ahead of a step whose inputs overwrite these positions of `slot`, in branch 0, 1 and so on.

        Returns where the branches lie among the slots of the buffers, the slot itself first.
        """
        mine = self._places.setdefault(slot, [])
        while len(mine) < len(rows) - 1:
            mine.append(self._taken)
            self._taken += 1
        places = mine[: len(rows) - 1]
        for part in self._counted:
            part.open_branches(slot, rows, places)
        return [slot, *places]

    def record_branch(self, slot: int, branch: int) -> None:
        """Note a branch after every layer has overwritten its entries."""
        self._branches[slot] = branch

    def keep_branch(self, slot: int, branch: int) -> None:
        """Make `slot` what its branch of this number holds, 0 for itself, and forget the branches.

        Raises StateError, and changes nothing, if there is no such branch.
        """
        if not 0 <= branch <= self.branches(slot):
            raise StateError(
                f"slot {slot} has no branch {branch}; its last step had branches 0 to {self.branches(slot)}"
            )
        for part in self._counted:
            part.keep_branch(slot, branch)
        self._branches.pop(slot, None)

    def hold(self, slot: int, length: int) -> None:
        """Make `slot` a sequence of `length` positions whose entries are overwritten before any is read.

        Raises StateError if a layer cannot replace its entries.
        """
        self.reset(slot)
        for part in self._counted:
            part.hold(slot, length)

    def lengthen(self, slot: int, length: int) -> None:
        """Add positions behind those of `slot`, up to `length`, that are overwritten before any is read.

        Raises StateError if a layer cannot replace its entries.
        """
        for part in self._counted:
            part.lengthen(slot, length)

    def shorten(self, slot: int, length: int) -> None:
        """Keep only the first `length` positions of a slot that `hold` made."""
        for part in self._counted:
            part.shorten(slot, length)

    # ---- slots

    def reset(self, slot: int) -> None:
        """Make `slot` an empty sequence."""
        for part in self.parts:
            part.reset(slot)
        self._forget(slot)

    def snapshot(self, slot: int) -> list[Any]:
        """What `slot` has committed, for pre-emption and beams: pages that they share, and copies."""
        return [part.snapshot(slot) for part in self.parts]

    def restore(self, slot: int, copy: Sequence[Any]) -> None:
        """Make `slot` what `snapshot` saw; raises StateError if the copy is of another model."""
        if len(copy) != len(self.parts):
            raise StateError(f"a snapshot of {len(copy)} parts does not fit {len(self.parts)}")
        # all before any: a half restored slot would be neither the old nor the new
        for part, piece in zip(self.parts, copy, strict=True):
            part.check(piece)
        for part, piece in zip(self.parts, copy, strict=True):
            part.restore(slot, piece)
        self._forget(slot)

    @property
    def only_grows(self) -> bool:
        """Whether the state of a text has in it the state of each beginning of the text."""
        return all(part.grows for part in self.parts)

    def whole(self, slot: int, length: int) -> bool:
        """Whether all layers have committed `length` tokens in `slot`; steps may have skipped some."""
        return all(part.lengths[slot] == length for part in self._counted)

    def pages(self, slot: int, start: int, stop: int) -> list[Pages]:
        """The pages that have positions start..stop of `slot` one by one: see `rest`, and `KVCache.pages`."""
        found = [part.pages(slot, start, stop) for part in self.parts if part.grows]
        return list(zip(*found, strict=True))

    def held_pages(self, slot: int) -> list[Page]:
        """The pages that `slot` may share with others."""
        return [page for part in self.parts if part.grows for page in part.table[slot]]

    def rest(self, slot: int) -> list[Any]:
        """A copy of what `slot` holds beside its pages: sums, open groups, windows."""
        return [part.snapshot(slot) for part in self.parts if not part.grows]

    def rebuild(self, slot: int, pages: Sequence[Pages], length: int, rest: Sequence[Any]) -> None:
        """Make `slot` the sequence of `length` positions that are in these pages, and of a `rest`.

        Raises StateError, and changes nothing, if the rest is of another model.
        """
        others = [part for part in self.parts if not part.grows]
        if len(others) != len(rest):
            raise StateError(f"a rest of {len(rest)} parts does not fit {len(others)}")
        for part, piece in zip(others, rest, strict=True):
            part.check(piece)
        for part, piece in zip(others, rest, strict=True):
            part.restore(slot, piece)
        for at, part in enumerate(part for part in self.parts if part.grows):
            part.put_pages(slot, [each[at] for each in pages], length)
        self._forget(slot)

    def fork(self, source: int, target: int) -> None:
        """Make `target` a copy of the committed state of `source`."""
        for part in self.parts:
            part.fork(source, target)
        self._forget(target)

    def bytes(self, *slots: int) -> int:
        """Bytes of the committed state of `slots`; pages that several of them share count once."""
        held = [page for slot in slots for page in self.held_pages(slot)]
        twice = sum(page.bytes for page in held) - bytes_of(held)
        return sum(part.bytes(slot) for part in self.parts for slot in slots) - twice

    def bytes_at(self, length: int, source: int = 0) -> int:
        """Bytes of the committed state of one sequence of `length` tokens that has read so long a source."""
        return sum(part.bytes_at(length if part.counts_tokens else source) for part in self.parts)


def _places(makers: Makers, kinds: dict[Hashable, list[StateMaker]]) -> Any:
    """Where the entries of one layer go; adds its makers to `kinds`."""
    if isinstance(makers, tuple):
        return [_places(each, kinds) for each in makers]
    spec = makers.state_spec()
    layers = kinds.setdefault(spec, [])
    layers.append(makers)
    return spec, len(layers) - 1


def _layer(place: Any, made: dict[Hashable, Any]) -> tuple[Any, int]:
    if isinstance(place, list):
        return MixedState(tuple(_layer(each, made) for each in place)), 0
    spec, index = place
    return made[spec], index


def places_of(layer: tuple[Any, int]) -> list[tuple[Any, int]]:
    """All states that a layer writes to, with its index in each."""
    state, _ = layer
    if isinstance(state, MixedState):
        return [found for part in state.parts for found in places_of(part)]
    return [layer]


def _chosen(layers: Collection[int] | None) -> frozenset[int] | None:
    return None if layers is None else frozenset(layers)
