"""The text of one sequence while it is denoised: a prompt, and masks that become tokens block by block."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence


class Canvas:
    """Prompt and output of one sequence; positions count from the first token of the prompt.

    Blocks are filled from left to right. What is decided never changes.

    Attributes:
        tokens: of all positions, the mask token where nothing is decided.
        prompt_length: positions of the prompt.
        undecided: positions that hold a mask.
        start: the first position of the current block.
        end: the position behind it; None until the first forward of the block has said how long it is.
        step: forwards that the current block has had.
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

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def open(self) -> list[int]:
        """What the next forward may decide: undecided positions of the block, or all if it has no end."""
        return sorted(p for p in self.undecided if self.end is None or p < self.end)

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

    def after(self, decisions: Mapping[int, int]) -> Canvas:
        """A copy that is a forward further: these tokens stand at these positions."""
        found = copy.copy(self)
        found.tokens, found.undecided = list(self.tokens), set(self.undecided)
        for position, token in decisions.items():
            found.decide(position, token)
        found.step += 1
        return found

    def next_block(self) -> list[int]:
        """Go on behind a full block; returns its tokens."""
        assert self.full and self.end is not None, "the block has masks"
        done = self.tokens[self.start : self.end]
        self.start, self.end, self.step = self.end, None, 0
        return done
