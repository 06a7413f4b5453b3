"""States whose entries of one slot lie in one buffer, oldest first: committed entries, then staged ones.

Staging writes behind the committed entries and never into them. Committing a chain only moves the border
between the two; committing a path of a tree first gathers its entries to the front. Rejected entries are
overwritten later, so they cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from linspec.decoding.step import MAX_STAGED
from linspec.state.contract import StateOptions
from linspec.state.entries import EntryFormat, EntrySpec
from linspec.state.memory import check_new_state, clear, zeros
from linspec.state.slots import SlotStates, StateSnapshot


class BufferState(SlotStates):
    """Base of the states in one buffer a slot; they differ in what happens to entries that leave it.

    keys [L, slots, Hkv, C, K], values [L, slots, Hkv, conv_history + C, V]: position p of a slot lies at
    p - its base position, but for what lies in pages: see KVCache. sums: see GroupedState.
    """

    contiguous = True

    @torch.inference_mode()
    def __init__(
        self,
        spec: EntrySpec,
        layers: int,
        slots: int,
        options: StateOptions,
        entries: EntryFormat | None = None,
    ) -> None:
        super().__init__(spec, layers, slots, options)
        if entries is not None:
            self.entries = entries
        positions = self._resting() + MAX_STAGED
        needed = self.entry_bytes(positions) + slots * self._sum_bytes()
        check_new_state(needed, positions, layers, slots, self.device)
        kept, shape = self.entries.kept_dtype(self.dtype), (layers, slots, spec.kv_heads)
        widths = self.entries.width(spec.key_width), self.entries.width(spec.value_width)
        self.keys = zeros((*shape, positions, widths[0]), kept, self.device)
        self.values = zeros((*shape, spec.conv_history + positions, widths[1]), kept, self.device)
        self.sums = self._new_sums(slots)
        # slot -> keys and values of every layer, for chains that are staged aside
        self.long: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    # ---- what a subclass says

    def _resting(self) -> int:
        """Most committed positions that stay in the buffer between rounds."""
        raise NotImplementedError

    def _leaving(self, held: int, *, aside: bool) -> int:
        """How many of `held` committed positions leave; aside: they were staged aside."""
        return 0

    def _let_go(self, slot: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take note of entries that leave; most states forget them."""

    def _own(self, slot: int) -> int:
        """Committed positions of `slot` that lie in its buffer."""
        return self.held(slot)

    def _sum_bytes(self) -> int:
        """Bytes of one slot beside its entries."""
        return 0

    def _new_sums(self, slots: int) -> torch.Tensor:
        return torch.empty(self.layers, 0, device=self.device)

    # ---- staging

    def reserve(self, slot: int, new: int) -> None:
        """Make room for `new` more staged nodes in `slot`; longer chains are staged aside."""
        if new > MAX_STAGED:
            return
        wanted = self._next(slot) + new
        # asked in every step, and rarely more than there is
        if wanted > self.keys.shape[3]:
            self._ensure(wanted)

    def _next(self, slot: int) -> int:
        """Where the next staged entry of `slot` lies."""
        return self._own(slot) + len(self.staged[slot])

    def _ensure(self, positions: int) -> None:
        """Buffers double, so that a cache that grows token by token is copied rarely."""
        have = self.keys.shape[3]
        if positions <= have:
            return
        more = max(positions, 2 * have) - have
        self.keys = self._grown(self.keys, more)
        self.values = self._grown(self.values, more)

    def _grown(self, entries: torch.Tensor, more: int, slots: int = 0) -> torch.Tensor:
        """A copy with `more` positions a slot and more slots; what none has written stays without memory."""
        shape = list(entries.shape)
        shape[1] += slots
        shape[3] += more
        grown = zeros(shape, entries.dtype, entries.device)
        for slot in range(entries.shape[1]):
            # keys have no history
            used = min(self._used(slot), entries.shape[3])
            grown[:, slot, :, :used] = entries[:, slot, :, :used]
        return grown

    def _used(self, slot: int) -> int:
        """How many rows of the buffer of `slot` were written, at most."""
        # a chain is in `long` before its nodes are recorded
        written = self.keys.shape[3] if slot in self.long else self._next(slot)
        return self.spec.conv_history + written

    def stage(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write new entries k, v [R, Hkv, N, .] of slots start.. behind what each has staged."""
        k, v = self.entries.encode(k), self.entries.encode(v)
        firsts = [self._next(start + i) for i in range(len(lengths))]
        history = self.spec.conv_history
        if len(set(firsts)) == 1 and len(set(lengths)) == 1:
            first, last = firsts[0], firsts[0] + lengths[0]
            slots = slice(start, start + len(lengths))
            self.keys[layer, slots, :, first:last] = k
            self.values[layer, slots, :, history + first : history + last] = v
            return
        for i, (first, n) in enumerate(zip(firsts, lengths, strict=True)):
            self.keys[layer, start + i, :, first : first + n] = k[i, :, :n]
            at = slice(history + first, history + first + n)
            self.values[layer, start + i, :, at] = v[i, :, :n]

    def stage_long(
        self, layer: int, start: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage chains of any length aside; returns keys and values from each base position on."""
        k, v = self.entries.encode(k), self.entries.encode(v)
        history, slots = self.spec.conv_history, range(start, start + len(lengths))
        held = [self.held(slot) for slot in slots]
        longest = max(b + n for b, n in zip(held, lengths, strict=True))
        keys = k.new_zeros(len(lengths), k.shape[1], longest, k.shape[3])
        values = v.new_zeros(len(lengths), v.shape[1], history + longest, v.shape[3])
        for i, (slot, b, n) in enumerate(zip(slots, held, lengths, strict=True)):
            keys[i, :, :b] = self.keys[layer, slot, :, :b]
            keys[i, :, b : b + n] = k[i, :, :n]
            values[i, :, : history + b] = self.values[layer, slot, :, : history + b]
            values[i, :, history + b : history + b + n] = v[i, :, :n]
            self.long.setdefault(slot, []).append((keys[i], values[i]))
        return self._decoded(keys, values)

    def room_aside(self, slot: int, new: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As `stage_long` for kernels that write the `new` entries of a chain: where they belong.

        Keys [Hkv, C, .] and values [Hkv, conv_history + C, .] of every layer, as they are kept:
        committed entries, then room.
        """
        spec, held = self.spec, self._next(slot)
        shape, behind = (self.layers, spec.kv_heads), spec.conv_history + held
        keys = self.keys.new_empty(*shape, held + new, self.keys.shape[-1])
        values = self.values.new_empty(*shape, behind + new, self.values.shape[-1])
        keys[:, :, :held] = self.keys[:, slot, :, :held]
        values[:, :, :behind] = self.values[:, slot, :, :behind]
        self.long[slot] = list(zip(keys, values, strict=True))
        return self.long[slot]

    def staged_aside(self, slot: int) -> bool:
        return slot in self.long

    def read(self, layer: int, slots: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of the first `width` positions: [R, Hkv, width, K], [R, Hkv, conv_history + width, V]."""
        keys = self.keys[layer, slots, :, :width]
        return self._decoded(keys, self.values[layer, slots, :, : self.spec.conv_history + width])

    def _decoded(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self.entries.decode(keys, self.spec.key_width, self.dtype),
            self.entries.decode(values, self.spec.value_width, self.dtype),
        )

    # ---- committing

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the staged nodes of `path`, in order, and drop the others."""
        # most commits move a border and touch no tensor: only what does pays for the inference mode
        if slot in self.long:
            self._commit_aside(slot, len(path))
        else:
            # a list is compared at once, a generator runs for each node
            if list(path) != list(range(len(path))):
                self._gather(slot, path)
            self.lengths[slot] += len(path)
            self._settle(slot)
        self.drop(slot)

    def drop(self, slot: int) -> None:
        """Forget what `slot` has staged."""
        super().drop(slot)
        self.long.pop(slot, None)

    @torch.inference_mode()
    def _gather(self, slot: int, path: Sequence[int]) -> None:
        # ascending, so a node that is copied from was never copied to; most of a short path is in place
        first = self._own(slot)
        for entries, at in ((self.keys, first), (self.values, self.spec.conv_history + first)):
            for place, node in enumerate(path):
                if place != node:
                    entries[:, slot, :, at + place] = entries[:, slot, :, at + node]

    def _settle(self, slot: int) -> None:
        """Let go of what leaves, and move the rest to the front."""
        held = self.held(slot)
        if gone := self._leaving(held, aside=False):
            self._move_up(slot, held, gone)

    @torch.inference_mode()
    def _move_up(self, slot: int, held: int, gone: int) -> None:
        """Fold the first `gone` of `held` entries, and move the rest to their place."""
        history = self.spec.conv_history
        keys, values = self.keys[:, slot], self.values[:, slot]
        self._let_all_go(slot, gone)
        keys[:, :, : held - gone] = keys[:, :, gone:held].clone()
        values[:, :, : history + held - gone] = values[:, :, gone : history + held].clone()
        self.base_positions[slot] += gone

    def _let_all_go(self, slot: int, gone: int) -> None:
        """`_let_go` in every layer, of the first `gone` entries of the buffer."""
        history = self.spec.conv_history
        keys, values = self.keys[:, slot, :, :gone], self.values[:, slot]
        for layer in range(self.layers):
            self._let_go(slot, layer, keys[layer], values[layer, :, history : history + gone])

    @torch.inference_mode()
    def _commit_aside(self, slot: int, count: int) -> None:
        """As `commit` for entries that were staged aside."""
        held = self._own(slot) + count
        gone = self._leaving(held, aside=True)
        self._ensure(held - gone)
        history = self.spec.conv_history
        for layer, (keys, values) in enumerate(self.long[slot]):
            if gone:
                self._let_go(slot, layer, keys[:, :gone], values[:, history : history + gone])
            self.keys[layer, slot, :, : held - gone] = keys[:, gone:held]
            rest = values[:, gone : history + held]
            self.values[layer, slot, :, : history + held - gone] = rest
        self.lengths[slot] += count
        self.base_positions[slot] += gone

    # ---- slots

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """Make `slot` an empty sequence."""
        self.drop(slot)
        self.lengths[slot], self.base_positions[slot] = 0, 0
        # entries left behind are multiplied by zero weights, which would keep a NaN alive
        self._clear(slot)

    def _clear(self, slot: int) -> None:
        """Zero the buffer of `slot`, and give its memory back."""
        for entries in (self.keys, self.values):
            clear(entries[:, slot])

    @torch.inference_mode()
    def snapshot(self, slot: int) -> Any:
        """A copy of what `slot` has committed."""
        held = self.held(slot)
        return StateSnapshot(
            spec=self.spec,
            entries=self.entries.name,
            length=self.lengths[slot],
            base_position=self.base_positions[slot],
            keys=self.keys[:, slot, :, :held].clone(),
            values=self.values[:, slot, :, : self.spec.conv_history + held].clone(),
        )

    @torch.inference_mode()
    def restore(self, slot: int, copy: Any) -> None:
        """Make `slot` what `snapshot` saw; raises StateError if the copy is of another model."""
        self.check(copy)
        self.reset(slot)
        self._ensure(copy.keys.shape[2])
        self.lengths[slot], self.base_positions[slot] = copy.length, copy.base_position
        self.keys[:, slot, :, : copy.keys.shape[2]] = copy.keys
        self.values[:, slot, :, : copy.values.shape[2]] = copy.values

    def fork(self, source: int, target: int) -> None:
        """Make `target` a copy of what `source` has committed."""
        self.restore(target, self.snapshot(source))
