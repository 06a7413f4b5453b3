"""How weights in the blocks of a GGUF file lie in tiles, as numbers: see `kernels/cpu/csrc/blocks.h`."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.quantization.blocks import BLOCK_FORMATS, TILE

# inputs of a group, and groups that share the scales of a K format
GROUP, SUPER = 32, 8
# of IQ4_NL: what codes stand for, and 128
LEVELS = (1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241)
_LINE = 4 * TILE


@dataclass(frozen=True, slots=True)
class BlockForm:
    """A weight is scale · (code - offset), and a minimum where there are minima.

    share: groups behind one header of float16 scales and minima; with more than one each group has factors of
    these. by_sixteen: they are of the scales of its inputs 0-15 and 16-31. levels: codes number LEVELS.
    """

    bits: int
    offset: int
    minima: bool = False
    share: int = 1
    by_sixteen: bool = False
    levels: bool = False

    @property
    def header(self) -> int:
        """Bytes of the header."""
        return 2 * TILE * (1 + self.minima)

    @property
    def factors(self) -> int:
        """Bytes of the factors of a group, which it begins with."""
        return 2 * TILE if self.share > 1 else 0

    @property
    def high(self) -> int:
        """Bytes of the bits 4 and 5 of its codes."""
        return {5: _LINE, 6: 2 * _LINE}.get(self.bits, 0)

    @property
    def low(self) -> int:
        """Bytes of the other bits."""
        return (8 if self.bits == 8 else 4) * _LINE

    @property
    def group(self) -> int:
        """Bytes of a group."""
        return self.factors + self.high + self.low

    @property
    def together(self) -> int:
        """Bytes of a header and its groups."""
        return self.header + self.share * self.group


FORMS = {
    "Q4_0": BlockForm(4, 8),
    "Q4_1": BlockForm(4, 0, minima=True),
    "Q5_0": BlockForm(5, 16),
    "Q5_1": BlockForm(5, 0, minima=True),
    "Q8_0": BlockForm(8, 128),
    "Q4_K": BlockForm(4, 0, minima=True, share=SUPER),
    "Q5_K": BlockForm(5, 0, minima=True, share=SUPER),
    "Q6_K": BlockForm(6, 32, share=SUPER, by_sixteen=True),
    "IQ4_NL": BlockForm(4, 128, levels=True),
}
assert FORMS.keys() == BLOCK_FORMATS.keys(), "every format has a form"
