"""The text of one sequence while it is denoised: a prompt, and masks that become tokens block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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
    """

    def __init__(self, prompt: Sequence[int], count: int, mask_id: int) -> None:
        """count: masks behind the prompt."""
        self.tokens, self.mask_id = list(prompt), mask_id
        self.prompt_length = self.start = len(prompt)
        self.undecided: set[int] = set()
        self.grow(count)
        self.end: int | None = None
        self.step = 0
        self.changed = False
        self._edits = Counter[int]()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def open(self) -> list[int]:
        """What the next forward may decide: undecided positions of the block, or all if it has no end."""
        return sorted(p for p in self.undecided if self.end is None or p < self.end)

    @property
    def block(self) -> range:
        """Positions of the current block, decided or not; all that follow if it has no end."""
        return range(self.start, len(self) if self.end is None else self.end)

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

    def grow(self, count: int) -> None:
        """Lay out `count` more masks."""
        self.undecided |= {*range(len(self), len(self) + count)}
        self.tokens += [self.mask_id] * count
        self.new = True

    def decide(self, position: int, token: int) -> None:
        """Put a token in the place of a mask."""
        self.undecided.remove(position)
        self.tokens[position] = token
        self.changed = True

    def replace(self, position: int, token: int) -> None:
        """Put another token in the place of one that is editable."""
        assert position in self.editable, f"position {position} may not change"
        self._edits[position] += 1
        self.tokens[position] = token
        self.changed = True

    def cut(self, length: int) -> int:
        """Keep only the first `length` positions; returns how many others there were."""
        dropped = len(self) - length
        del self.tokens[length:]
        self.undecided = {position for position in self.undecided if position < length}
        self.end = None if self.end is None else min(self.end, length)
        return dropped

    def next_block(self) -> list[int]:
        """Go on behind a full block; returns its tokens."""
        assert self.full and self.end is not None, "the block has masks"
        done = self.tokens[self.start : self.end]
        self.start, self.end, self.step = self.end, None, 0
        self._edits.clear()
        return done
