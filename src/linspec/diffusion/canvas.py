"""The text of one sequence while it is denoised: a prompt, and masks that become tokens block by block."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

# how often one position may be replaced
EDITS = 2


class Canvas:
    """Prompt and output of one sequence; positions count from the first token of the prompt.

    Blocks are filled from left to right. What is decided never changes, except in the current block: there a
    token may be replaced, up to EDITS times, so that every block comes to an end.

    Attributes:
        tokens: of all positions, the mask token where nothing is decided.
        prompt_length: positions of the prompt.
        undecided: positions that hold a mask.
        start: the first position of the current block.
        end: the position behind it; None until the first forward of the block has said how long it is.
        step: forwards that the current block has had.
        changed: whether the last forward decided or replaced something.
        new: whether no forward has seen all of its positions: at first, and when it has grown.
        unit: of a block-diffusion model, how many positions its blocks have, counted from position 0.
        logit_shift: how many positions ahead of a token its logits stand.
        ahead: what the next forward decides, where the commit policy knows it before; else empty.
        lots: a random number of each position that has been in a random order.
        window: most masks that are open at once, the first ones of the block; None for all.
        kept: what the cache policy keeps of the sequence, which is dropped with it.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        count: int,
        mask_id: int,
        logit_shift: int = 0,
        unit: int | None = None,
    ) -> None:
        """count: masks behind the prompt. unit: positions of a block of a block-diffusion model."""
        self.unit = unit
        self.tokens, self.mask_id, self.logit_shift = list(prompt), mask_id, logit_shift
        self.prompt_length = self.start = len(prompt)
        self.undecided: set[int] = set()
        self.grow(count)
        self.end: int | None = None
        self.step = 0
        self.ahead: Sequence[int] = ()
        self.lots: dict[int, float] = {}
        self.window: int | None = None
        self.kept: Any = None
        self.changed = False
        self._edits = Counter[int]()
        self._steps_before = 0
        self._decided_by: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def open(self) -> list[int]:
        """What the next forward may decide: undecided positions of the block, or all it may have."""
        end = self.reach if self.end is None else self.end
        masks = sorted(p for p in self.undecided if p < end)
        return masks[: self.window]

    @property
    def block(self) -> range:
        """Positions of the current block, decided or not; all that follow if it has no end."""
        return range(self.start, self.reach if self.end is None else self.end)

    @property
    def reach(self) -> int:
        """The position behind all that the current block can see, and so behind its end."""
        if self.unit is None:
            return len(self)
        return min((self.start // self.unit + 1) * self.unit, len(self))

    @property
    def editable(self) -> list[int]:
        """Decided positions of the block whose token may be replaced."""
        return [p for p in self.block if p not in self.undecided and self._edits[p] < EDITS]

    @property
    def full(self) -> bool:
        """Whether nothing in the current block is undecided."""
        return self.end is not None and not self.open

    @property
    def decided(self) -> int:
        """Positions of the output that are decided."""
        return len(self) - self.prompt_length - len(self.undecided)

    @property
    def forwards(self) -> int:
        """Forwards that all blocks have had."""
        return self._steps_before + self.step

    @property
    def fresh(self) -> list[int]:
        """What the last forward decided: no forward has computed these positions as words yet."""
        return [p for p in range(self.prompt_length, len(self)) if self.age(p) == 1]

    def age(self, position: int) -> float:
        """Forwards since a position was decided: 0 for a mask, 1 for what is fresh, inf for the prompt."""
        if position in self.undecided:
            return 0
        return self.forwards - self._decided_by.get(position, -math.inf)

    def grow(self, count: int) -> None:
        """Lay out `count` more masks."""
        self.undecided |= {*range(len(self), len(self) + count)}
        self.tokens += [self.mask_id] * count
        self.new = True

    def decide(self, position: int, token: int) -> None:
        """Put a token in the place of a mask."""
        self.undecided.remove(position)
        self.tokens[position] = token
        self._decided_by[position] = self.forwards
        self.changed = True

    def replace(self, position: int, token: int) -> None:
        """Put another token in the place of one that is editable."""
        assert position in self.editable, f"position {position} may not change"
        self._edits[position] += 1
        self.tokens[position] = token
        self._decided_by[position] = self.forwards
        self.changed = True

    def cut(self, length: int) -> int:
        """Keep only the first `length` positions; returns how many others there were."""
        dropped = len(self) - length
        del self.tokens[length:]
        self.undecided = {position for position in self.undecided if position < length}
        self.end = None if self.end is None else min(self.end, length)
        return dropped

    def after(self, decisions: Mapping[int, int]) -> Canvas:
        """A copy that is a forward further: these tokens stand at these positions."""
        found = copy.copy(self)
        found.tokens, found.undecided = list(self.tokens), set(self.undecided)
        found.lots, found._decided_by = dict(self.lots), dict(self._decided_by)
        found._edits = self._edits.copy()
        for position, token in decisions.items():
            found.decide(position, token)
        found.step += 1
        return found

    def next_block(self) -> list[int]:
        """Go on behind a full block; returns its tokens."""
        assert self.full and self.end is not None, "the block has masks"
        done = self.tokens[self.start : self.end]
        self._steps_before += self.step
        self.start, self.end, self.step = self.end, None, 0
        self._edits.clear()
        return done

    def leave(self) -> list[int]:
        """Go on behind a full block, or with a window behind all that is decided; returns the tokens."""
        if self.full:
            return self.next_block()
        if self.window is None:
            return []
        start, self.start = self.start, self.open[0]
        return self.tokens[start : self.start]
