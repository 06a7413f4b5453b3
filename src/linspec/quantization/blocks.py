"""Formats of blocks in GGUF files that linspec computes with as they are.

    BLOCK_FORMATS["Q4_K"].tile_bytes(2048) * 32 / 2048      # bits per weight

`kernels/cpu/csrc/blocks.h` says how they lie in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 32


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """`inputs` values of an output lie together in `bytes` bytes of a file; the same of 32 outputs take
    `tile` bytes in memory. number: that of GGUF. halves: which bytes of a block are 16-bit floats."""

    name: str
    number: int
    inputs: int
    bytes: int
    tile: int
    halves: tuple[int, ...]

    def tile_bytes(self, inputs: int) -> int:
        """Bytes of 32 outputs."""
        return inputs // self.inputs * self.tile

    def bytes_of(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix in memory."""
        return -(-outputs // TILE) * self.tile_bytes(inputs)


_ALL = (
    BlockFormat("Q4_0", 2, 32, 18, 576, (0, 1)),
    BlockFormat("Q4_1", 3, 32, 20, 640, (0, 1, 2, 3)),
    BlockFormat("Q5_0", 6, 32, 22, 704, (0, 1)),
    BlockFormat("Q5_1", 7, 32, 24, 768, (0, 1, 2, 3)),
    BlockFormat("Q8_0", 8, 32, 34, 1088, (0, 1)),
    BlockFormat("Q4_K", 12, 256, 144, 4736, (0, 1, 2, 3)),
    BlockFormat("Q5_K", 13, 256, 176, 5760, (0, 1, 2, 3)),
    BlockFormat("Q6_K", 14, 256, 210, 6720, (208, 209)),
    BlockFormat("IQ4_NL", 20, 32, 18, 576, (0, 1)),
)
BLOCK_FORMATS = {each.name: each for each in _ALL}
BY_NUMBER = {each.number: each for each in _ALL}
