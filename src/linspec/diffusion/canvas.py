"""The text of one sequence while it is denoised: a prompt, and masks that become tokens block by block."""

from __future__ import annotations

from collections.abc import Sequence


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
    """

    def __init__(self, prompt: Sequence[int], count: int, mask_id: int) -> None:
        """count: positions of the output."""
        self.tokens = [*prompt, *[mask_id] * count]
        self.prompt_length = self.start = len(prompt)
        self.undecided = set(range(len(prompt), len(self.tokens)))
        self.end: int | None = None
        self.step = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def new(self) -> bool:
        """Whether no forward has seen it."""
        return self.step == 0 and self.start == self.prompt_length

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

    def decide(self, position: int, token: int) -> None:
        """Put a token in the place of a mask."""
        self.undecided.remove(position)
        self.tokens[position] = token

    def next_block(self) -> list[int]:
        """Go on behind a full block; returns its tokens."""
        assert self.full and self.end is not None, "the block has masks"
        done = self.tokens[self.start : self.end]
        self.start, self.end, self.step = self.end, None, 0
        return done
